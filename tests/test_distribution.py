"""The name the package is installed by: `zerofl` on the package index belongs to somebody else."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import requires, version
from pathlib import Path

import pytest

import zerofl
from zerofl.errors import DISTRIBUTION, install_hint

ROOT = Path(__file__).parents[1]
TEXTS = sorted(
    path
    for place in ("*.md", "docs/**/*.md", "src/**/*.py", "src/**/*.toml", "examples/**/*", "benchmarks/*", "Makefile")
    for path in ROOT.glob(place)
    if path.is_file() and path.suffix != ".pyc"
)
BY_NAME = re.compile(r"(pip3?|uv|pipx|poetry)\s+(pip\s+)?(install|add|download)\b[^\n#`]*[\s'\"]zerofl\b(?!/)", re.I)


@pytest.mark.parametrize(
    ("text", "is_by_name"),
    [
        ("pip install zerofl", True),
        ("pip install --upgrade 'zerofl[ray]'", True),
        ("uv pip install zerofl", True),
        ("pip install zerofl-torch", True),
        ("pip install '.[ray]'", False),
        ("pip install ../zerofl", False),
        ("pip install librosa, then zerofl run", True),  # too careful rather than too lax
    ],
)
def test_the_search_finds_installs_by_name(text: str, is_by_name: bool) -> None:
    assert bool(BY_NAME.search(text)) == is_by_name


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_installs_the_package_by_name(path: Path) -> None:
    assert not BY_NAME.search(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/*/pyproject.toml")), ids=lambda path: path.parent.name)
def test_no_example_depends_on_it_by_name(path: Path) -> None:
    project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
    assert not [line for line in project["dependencies"] if line.lower().startswith("zerofl")]


def test_a_hint_names_what_the_extra_needs() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for extra in ("demo", "gpu", "hub", "images", "ray", "report", "speech", "tensorboard"):
        words = install_hint(extra).split("'")
        assert words[0] == "pip install "
        names = [re.split(r"[\[<>=]", word)[0] for word in words[1::2]]
        assert names == [re.split(r"[\[<>=]", word)[0] for word in extras[extra]]


def test_the_version_is_that_of_the_distribution() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["name"] == DISTRIBUTION != "zerofl"
    assert zerofl.__version__ == version(DISTRIBUTION)  # which is read from the source
    assert requires(DISTRIBUTION)


def test_it_runs_from_its_sources_without_being_installed() -> None:
    """Without metadata, as on a machine to which only the tree was copied."""
    program = f"""
import importlib.metadata as metadata
found = metadata.Distribution.from_name
def from_name(name):
    if name == {DISTRIBUTION!r}:
        raise metadata.PackageNotFoundError(name)
    return found(name)
metadata.Distribution.from_name = from_name
import zerofl
from zerofl.errors import install_hint
from zerofl.run.origin import versions
print(zerofl.__version__, versions()["zerofl"], install_hint("gpu"))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr == ""
    own, recorded, hint = done.stdout.strip().split(" ", 2)
    assert own == recorded == zerofl.__version__
    assert hint == "pip install '.[gpu]' in the folder of the sources"
