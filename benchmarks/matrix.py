"""Test the wheel on every Python, torch and numpy it is for, with kernels and without a compiler: `make matrix`.

Not every combination, but all pairs of versions, and every pair for each Python: four cells a Python instead of eight.
What cannot be run on a machine is skipped by name. A cell is what `make wheel` does, in an environment that is
removed afterwards. The record says what was run, and is what docs/platforms.md shows.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from wheels import (
    CPU_BUILDS,
    TORCH_INDEX,
    NotHereError,
    build_sdist,
    build_wheel,
    install,
    new_environment,
    probe,
    run_tests,
    unpacked,
)

from zerofl.run.origin import code, machine

PYTHONS = {"3.11": "2.0", "3.12": "2.0", "3.13": "2.1"}
"""The Pythons, each with the first numpy from 2.0 on that has a wheel for it."""


class Cell(NamedTuple):
    """One environment: versions as their first numbers, "newest" for what pip chooses."""

    python: str
    torch: str
    numpy: str
    kernels: bool

    def __str__(self) -> str:
        kernels = "kernels" if self.kernels else "no compiler"
        return f"Python {self.python}, torch {self.torch}, numpy {self.numpy}, {kernels}"


def cells(pythons: list[str]) -> list[Cell]:
    """Four for each Python, in which any two values of torch, numpy and kernels are together once."""
    return [
        Cell(python, torch, numpy, kernels)
        for python in pythons
        for torch, numpy, kernels in (
            ("2.6", PYTHONS[python], True),
            ("2.6", "newest", False),
            ("2.13", PYTHONS[python], False),
            ("2.13", "newest", True),
        )
    ]


def find_python(version: str) -> str:
    """A Python of this version, of pyenv's or on the PATH.

    Raises:
        NotHereError: there is none.
    """
    found = sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python"))
    python = str(found[-1]) if found else shutil.which(f"python{version}")
    if python is None:
        raise NotHereError(f"no Python {version} in ~/.pyenv/versions or on the PATH")
    return python


def run_cell(cell: Cell, sdist: Path, wheels: Path, tests: list[str], torch_index: str) -> dict[str, Any]:
    """A cell's record: its choices, and either why it was skipped or what was installed and what came out."""
    torch, numpy = f"=={cell.torch}.*", "" if cell.numpy == "newest" else f"=={cell.numpy}.*"
    with tempfile.TemporaryDirectory(prefix="zerofl-matrix-") as name:
        environment = Path(name) / "venv"
        try:
            found = find_python(cell.python)
            python = new_environment(found, environment, torch, numpy, torch_index)
        except NotHereError as error:
            return {**cell._asdict(), "skipped": str(error)}
        folder = wheels / f"{cell.python}-{cell.kernels}"
        wheel = next(folder.glob("*.whl"), None) or build_wheel(found, sdist, folder, cell.kernels)
        try:
            install(wheel, environment, torch, numpy)
        except subprocess.CalledProcessError:
            return {**cell._asdict(), "status": 1, "result": "pip could not install it"}
        tree = unpacked(sdist, Path(name) / "tree")
        has = probe(python, tree, cell.kernels)
        status, result = run_tests(python, tree, tests)
    versions = {package: has[package] for package in ("python", "torch", "numpy")}
    return {**cell._asdict(), "versions": versions, "status": status, "result": result}


def main() -> int:
    """Run the cells, and print and perhaps write the record; returns 1 if one failed, 2 if none was run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("tests", nargs="*", metavar="TESTS", help="for pytest, as in tests/sparse; all by default")
    parser.add_argument("--python", nargs="+", choices=PYTHONS, default=list(PYTHONS))
    parser.add_argument("--torch-index", default=CPU_BUILDS, help=TORCH_INDEX)
    parser.add_argument("--record", metavar="FILE", type=Path, help="write it, once a cell was run")
    options = parser.parse_args()
    origin = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "sources_sha256": code()["sources_sha256"],
    }
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="zerofl-matrix-") as name:
        folder = Path(name)
        sdist = build_sdist(folder / "sdist")
        for cell in cells(options.python):
            print(f"== {cell}", flush=True)
            records.append(run_cell(cell, sdist, folder, options.tests, options.torch_index))
            print(f"== {cell}: {outcome(records[-1])}", flush=True)
            # After each, for a matrix takes hours; but a record is not given up for one in which nothing was run.
            if options.record and any("skipped" not in record for record in records):
                write(options.record, origin | {"tests": options.tests or ["all"], "cells": records})
    print(table({"cells": records}))
    run = [record for record in records if "skipped" not in record]
    return 1 if any(record["status"] for record in run) else 0 if run else 2


def write(path: Path, record: dict[str, Any]) -> None:
    """Write the record; what the file has of other Pythons, by the same code, tests and machine, stays."""
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"cells": []}
    cells, pythons = record["cells"], {cell["python"] for cell in record["cells"]}
    if all(before.get(key) == record[key] for key in ("machine", "sources_sha256", "tests")):
        cells = sorted(cells + [cell for cell in before["cells"] if cell["python"] not in pythons], key=_python_first)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record | {"cells": cells}, indent=1) + "\n", encoding="utf-8")


def _python_first(cell: dict[str, Any]) -> str:
    return str(cell["python"])


def outcome(record: dict[str, Any]) -> str:
    """What came out of a cell, in a line."""
    return str(record["result"] if "result" in record else f"skipped: {record['skipped']}")


def table(record: dict[str, Any]) -> str:
    """The record as docs/platforms.md has it."""
    lines = ["| Python | torch | numpy | kernels | result |", "|---|---|---|---|---|"]
    for cell in record["cells"]:
        versions = cell.get("versions", cell)
        columns = [versions[name] for name in ("python", "torch", "numpy")]
        columns += ["yes" if cell["kernels"] else "no compiler", outcome(cell)]
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
