"""Build the sdist and the wheel into dist/, and test the wheel as a stranger has it: `make wheel`.

The wheel is built from the sdist, and installed into a new environment outside this folder. The tests run there too,
on what the sdist holds without its src/, so that they can find no other `zerofl` than the installed one, and nothing
that is missing from the sdist.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CPU_BUILDS = "https://download.pytorch.org/whl/cpu"
"""PyTorch's own index of builds without CUDA."""
TORCH_INDEX = "where torch is taken from beside pip's --find-links; '' for nowhere else"

_PROBE = """
import json, platform
from importlib.metadata import version
import zerofl
from zerofl.sparse import dispatch
print(json.dumps({
    "zerofl": zerofl.__file__, "kernels": dispatch.UNAVAILABLE is None, "python": platform.python_version(),
    "torch": version("torch"), "numpy": version("numpy"),
}))
"""


class NotHereError(Exception):
    """What this machine cannot run, and why: it is skipped by this name."""


def build_sdist(folder: Path) -> Path:
    """The sdist of this checkout, in a folder that is made."""
    _run([sys.executable, "-m", "build", "--sdist", "--outdir", str(folder), "."], stdout=subprocess.DEVNULL)
    (sdist,) = folder.glob("*.tar.gz")
    return sdist


def build_wheel(python: str, sdist: Path, folder: Path, kernels: bool) -> Path:
    """The wheel of an sdist for a Python, in a folder that is made; without kernels as where there is no compiler."""
    environment = {} if kernels else {"CXX": str(folder / "no-compiler")}
    _run([python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(sdist)], environment)
    (wheel,) = folder.glob("*.whl")
    return wheel


def unpacked(sdist: Path, folder: Path) -> Path:
    """The tree that an sdist holds, without src/."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (tree,) = folder.iterdir()
    shutil.rmtree(tree / "src")
    return tree


def new_environment(python: str, folder: Path, torch: str, numpy: str, torch_index: str) -> Path:
    """The python of a new environment in a folder, with these torch and numpy: "==2.6.*", or "" for the newest.

    torch comes from `torch_index` or from the folders that pip is configured to look into (PIP_FIND_LINKS), because on
    Linux the one of the package index brings gigabytes of CUDA.

    Raises:
        NotHereError: no such build of torch or numpy for this Python.
    """
    _run([python, "-m", "venv", str(folder)])
    index = ["--retries", "0", "--index-url", torch_index] if torch_index else ["--no-index"]
    for name, options in ((f"torch{torch}", ["--no-deps", *index]), (f"numpy{numpy}", ["--only-binary", "numpy"])):
        done = subprocess.run([*_pip(folder), *options, name], stderr=subprocess.PIPE, text=True)
        # The second is what pip says where it is configured with constraints; neither numpy nor this torch has others.
        if any(f"{words} {name}" in done.stderr for words in ("No matching distribution found for", "Cannot install")):
            where = "without CUDA where torch is taken from" if name.startswith("torch") else "as a wheel"
            raise NotHereError(f"pip finds no {name} {where}")
        if done.returncode:
            raise RuntimeError(f"pip could not install {name}: {done.stderr}")
    return folder / "bin" / "python"


def install(wheel: Path, folder: Path, torch: str, numpy: str) -> None:
    """Install a wheel and what its tests need into an environment, beside its torch and numpy.

    The rest has the versions of constraints.txt, some of which ask for a newer numpy: with a given one, pip chooses.
    """
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    rest = [] if numpy else [line for line in lines if not line.startswith(("torch==", "numpy=="))]
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join([*rest, f"torch{torch}", f"numpy{numpy}", ""]), encoding="utf-8")
    _run([*_pip(folder), "-c", str(constraints), f"zerofl-torch[test] @ {wheel.as_uri()}"])


def probe(python: Path, tree: Path, kernels: bool) -> dict[str, Any]:
    """What an environment has; raises where its zerofl is not the installed one, or its kernels are not as expected."""
    done = subprocess.run([python, "-c", _PROBE], cwd=tree, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    environment = python.parents[1].resolve()
    if environment not in Path(found["zerofl"]).resolve().parents:
        raise RuntimeError(f"the tests would see {found['zerofl']}, not the wheel installed in {environment}")
    if found["kernels"] != kernels:
        raise RuntimeError(f"the wheel has {'' if found['kernels'] else 'no '}kernels")
    return found


def run_tests(python: Path, tree: Path, tests: list[str]) -> tuple[int, str]:
    """pytest's status, and its last line; what it prints goes to the terminal as it comes."""
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    command = [str(python), "-m", "pytest", "-p", "no:cacheprovider", "-rfEs", *tests]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"PATH": path}
    last = ""
    with subprocess.Popen(command, cwd=tree, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
    return process.returncode, last


def _pip(folder: Path) -> list[str]:
    return [
        str(folder / "bin" / "python"),
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-compile",
        "--disable-pip-version-check",
    ]


def _run(command: list[str], environment: dict[str, str] | None = None, stdout: int | None = None) -> None:
    subprocess.run(command, cwd=ROOT, env=os.environ | (environment or {}), stdout=stdout, check=True)


def main() -> int:
    """Build into dist/ and test; returns pytest's status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("tests", nargs="*", metavar="TESTS", help="for pytest, as in tests/sparse; all by default")
    parser.add_argument("--python", default=sys.executable, help="the Python to build and test for")
    parser.add_argument("--torch-index", default=CPU_BUILDS, help=TORCH_INDEX)
    options = parser.parse_args()
    dist = ROOT / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    sdist = build_sdist(dist)
    with tempfile.TemporaryDirectory(prefix="zerofl-wheel-") as name:
        folder = Path(name)
        wheel = build_wheel(options.python, sdist, folder / "wheel", kernels=True)
        shutil.copy(wheel, dist)
        tree = unpacked(sdist, folder / "tree")
        python = new_environment(options.python, folder / "venv", "==2.13.*", "", options.torch_index)
        install(wheel, folder / "venv", "==2.13.*", "")
        print(probe(python, tree, kernels=True), flush=True)
        status, _ = run_tests(python, tree, options.tests)
    print(f"{sdist.name} and {wheel.name} are in dist/")
    return status


if __name__ == "__main__":
    sys.exit(main())
