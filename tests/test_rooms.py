"""The house: which room of the package may know which, counted from the imports."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import zerofl

PACKAGE = Path(zerofl.__file__).parent

# From the ground up: a room knows those that stand before it.
ROOMS = (
    "errors", "rng", "sparse", "models", "exchange", "data", "experiment",
    "fl", "run", "report", "bench", "flower", "cli",
)  # fmt: skip
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """The full names of the modules that a file imports anywhere, or of what it imports from them."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_these_are_the_rooms() -> None:
    assert {room_of(path) for path in FILES} == set(ROOMS)
    assert len(ROOMS) <= 13


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows_run_in_one_direction(path: Path) -> None:
    """So there is no circle either."""
    known = set(ROOMS[: ROOMS.index(room_of(path)) + 1]) | {"_native", "__version__"}
    of_us = {name.split(".")[1] for name in imports(path) if name.startswith("zerofl.")}
    assert of_us <= known


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_flower_knows_flower(path: Path) -> None:
    packages = {name.split(".")[0] for name in imports(path)}
    assert room_of(path) == "flower" or not packages & {"flwr", "ray"}


ROOT = Path(__file__).parents[1]
LONGEST = [(PACKAGE, "*.py", 350), (ROOT / "cpp", "*.*", 350), (ROOT / "tests", "*.py", 300)]


@pytest.mark.parametrize(("folder", "kinds", "most"), LONGEST, ids=["src", "cpp", "tests"])
def test_no_file_is_long(folder: Path, kinds: str, most: int) -> None:
    files = list(folder.rglob(kinds))
    lines = {str(path): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert len(lines) > 10
    assert {path: count for path, count in lines.items() if count > most} == {}
