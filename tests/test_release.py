"""What a release says of itself, and how `make wheel` and `make matrix` find out."""

import contextlib
import itertools
import json
import re
import sys
import tomllib
from pathlib import Path

import pytest

import zerofl
from tests.documents.reading import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import matrix
import wheels


def test_the_citation_and_the_changelog_have_the_version() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    version, date = (re.findall(rf"^{key}: (.*)$", citation, re.MULTILINE) for key in ("version", "date-released"))
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## ([\d.]+), (.*)$", changelog, re.MULTILINE)[0] == (*version, *date)
    # What has changed since is no release, and is not called one: its updates may not be read by that.
    unreleased = changelog.partition("## Unreleased\n")[2].partition("\n## ")[0].strip()
    assert re.fullmatch(r"\d+\.\d+\.\d+\.dev0" if unreleased else re.escape(version[0]), zerofl.__version__)
    newer, last = (tuple(map(int, text.split(".")[:3])) for text in (zerofl.__version__, version[0]))
    assert newer > last if unreleased else newer == last


def test_any_two_choices_of_the_matrix_meet_on_each_python() -> None:
    for python, oldest in matrix.PYTHONS.items():
        cells = matrix.cells([python])
        assert len(cells) == 4
        choices = {"torch": ("2.6", "2.13"), "numpy": (oldest, "newest"), "kernels": (True, False)}
        for (one, values), (other, other_values) in itertools.combinations(choices.items(), 2):
            met = {(getattr(cell, one), getattr(cell, other)) for cell in cells}
            assert met == set(itertools.product(values, other_values))


def test_the_matrix_has_the_pythons_that_wheels_are_built_for() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert settings["tool"]["cibuildwheel"]["build"] == [f"cp{name.replace('.', '')}-*" for name in matrix.PYTHONS]
    assert settings["project"]["requires-python"] == f">={next(iter(matrix.PYTHONS))}"


def test_the_documents_show_the_record() -> None:
    page = (ROOT / "docs" / "platforms.md").read_text(encoding="utf-8")
    record = json.loads((ROOT / "benchmarks/results/matrix.json").read_text(encoding="utf-8"))
    assert matrix.table(record) in page
    assert f"`{' '.join(record['tests'])}`" in " ".join(page.split())
    assert {cell["python"] for cell in record["cells"]} == set(matrix.PYTHONS)
    assert not [cell for cell in record["cells"] if cell.get("status")]


def test_a_record_is_written_where_it_is_asked_for_and_something_was_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first Python's cells are skipped, those of the second are run."""
    path, here = tmp_path / "folder" / "matrix.json", matrix.PYTHONS
    results = {"3.12": {"skipped": "not there"}, "3.13": {"status": 0, "result": "5 passed", "versions": {
        "python": "3.13.0", "torch": "2.13.0", "numpy": "2.5"}}}  # fmt: skip
    monkeypatch.setattr(matrix, "build_sdist", lambda folder: folder)
    monkeypatch.setattr(matrix, "run_cell", lambda cell, *_: cell._asdict() | results[cell.python])
    for pythons, status, cells in ((["3.12"], 2, 0), (["3.13"], 0, 4), (["3.12"], 2, 4), (["3.12", "3.13"], 0, 8)):
        monkeypatch.setattr(sys, "argv", ["matrix.py", "--record", str(path), "--python", *pythons, "--", "tests/a"])
        assert matrix.main() == status
        assert path.exists() == bool(cells)
        assert len(json.loads(path.read_text())["cells"] if cells else []) == cells
    assert set(here) > {"3.12", "3.13"}
    assert "5 passed" in capsys.readouterr().out


def test_a_python_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(wheels.NotHereError, match=r"^no Python 3\.12 in ~/\.pyenv/versions or on the PATH$"):
        matrix.find_python("3.12")
    python = tmp_path / ".pyenv" / "versions" / "3.12.1" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    assert matrix.find_python("3.12") == str(python)


@pytest.mark.parametrize(
    ("place", "kernels", "message"),
    [
        ("venv/lib/zerofl/__init__.py", True, None),
        ("venv/lib/zerofl/__init__.py", False, "^the wheel has no kernels$"),
        (
            "src/zerofl/__init__.py",
            True,
            "^the tests would see .*/src/zerofl/.*, not the wheel installed in .*venv$",
        ),
    ],
)
def test_only_the_wheel_is_tested(tmp_path: Path, place: str, kernels: bool, message: str | None) -> None:
    answer = {"zerofl": str(tmp_path / place), "kernels": kernels}
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\necho '{json.dumps(answer)}'\n")
    python.chmod(0o755)
    with pytest.raises(RuntimeError, match=message) if message else contextlib.nullcontext():
        assert wheels.probe(python, tmp_path, kernels=True) == answer
