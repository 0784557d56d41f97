"""What figures depend on beside their settings: the machine, the versions of packages, and the code itself."""

import functools
import hashlib
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

from zerofl import __version__
from zerofl.sparse import dispatch

CPUINFO = Path("/proc/cpuinfo")


def origin() -> dict[str, Any]:
    """What every record says of where it comes from: `machine`, `versions` and `code`."""
    return {"machine": machine(), "versions": versions(), "code": dict(code())}


def machine() -> str:
    """The processor and the number of cores, to read figures by.

    A virtual machine's processor may be called "AMD EPYC" and no more: family and model tell its generation.
    """
    name = platform.processor() or platform.machine()
    try:
        lines = CPUINFO.read_text(encoding="utf-8").split("\n\n", 1)[0].splitlines()
    except OSError:
        lines = []  # not Linux: the platform's own name stands
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    known = {"cpu family", "model"} <= facts.keys()
    generation = f" (family {facts['cpu family']}, model {facts['model']})" if known else ""
    return f"{facts.get('model name', name)}{generation}, {os.cpu_count()} cores"


def versions() -> dict[str, str]:
    """The versions of what figures depend on."""
    packages = ("torch", "flwr", "numpy", "constriction")
    of_packages = {package: version(package) for package in packages}
    return {"python": platform.python_version(), "zerofl": __version__, **of_packages}


@functools.cache
def code() -> dict[str, str]:
    """Which code this is: `sources_sha256` over the package's Python and CUDA files and the sources of its kernels.

    In a checkout also its `commit`, with `+changes` where files of the package or the kernels differ from it. Both are
    taken once, so call it before long work during which somebody may edit the files.
    """
    return code_of(Path(__file__).parents[1])


def code_of(package: Path) -> dict[str, str]:
    """`code` of the package in this folder, as it is now."""
    return {"sources_sha256": sources_sha256(package), **_commit(package)}


def sources_sha256(package: Path) -> str:
    """SHA-256 over the names and contents of a folder's Python and CUDA files, and what the kernels were built from."""
    digest = hashlib.sha256()
    for path in sorted([*package.rglob("*.py"), *package.rglob("*.cu")]):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(package).as_posix()} {len(content)}\n".encode() + content)
    digest.update(dispatch.sources().encode())
    return digest.hexdigest()


def _commit(package: Path) -> dict[str, str]:
    """The commit of the checkout that tracks these files: not of a repository that happens to be around them."""
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return {}
    commit = _git(package, "rev-parse", "HEAD")
    changes = _git(package, "status", "--porcelain", "--", ".", ":/cpp", ":/CMakeLists.txt")
    return {} if commit is None else {"commit": commit + ("+changes" if changes else "")}


def _git(folder: Path, *arguments: str) -> str | None:
    """What git answers, or None where there is no git or it fails."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
