"""Where a record says it comes from."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from zerofl.run import origin
from zerofl.sparse import dispatch

PACKAGE = Path(origin.__file__).parents[1]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A few files of the package, elsewhere."""
    for name in ("__init__.py", "rng.py", "exchange/wire/entropy.py"):
        (tmp_path / "zerofl" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PACKAGE / name, tmp_path / "zerofl" / name)
    return tmp_path / "zerofl"


def git(folder: Path, *arguments: str) -> str:
    names = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", "-C", str(folder), *names, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_the_hash_is_of_names_contents_and_kernels(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = origin.sources_sha256(copy)
    assert origin.sources_sha256(copy) == before
    assert len(before) == 64
    (copy / "notes.txt").write_text("no code")
    assert origin.sources_sha256(copy) == before
    (copy / "rng.py").rename(copy / "rng2.py")
    renamed = origin.sources_sha256(copy)
    (copy / "rng2.py").write_text("SEED = 2\n")
    changed = origin.sources_sha256(copy)
    monkeypatch.setattr(dispatch, "sources", lambda: "other kernels")
    other_kernels = origin.sources_sha256(copy)
    assert len({before, renamed, changed, other_kernels}) == 4


def test_the_commit_is_of_the_checkout_that_tracks_the_package(copy: Path) -> None:
    around = copy.parent
    assert "commit" not in origin.code_of(copy)
    git(around, "init", "--quiet")
    (around / "own.txt").write_text("a project of somebody's that has the package installed inside")
    git(around, "add", "own.txt")
    git(around, "commit", "--quiet", "-m", "first")
    assert "commit" not in origin.code_of(copy)
    git(around, "add", "zerofl")
    git(around, "commit", "--quiet", "-m", "second")
    commit = git(around, "rev-parse", "HEAD")
    assert origin.code_of(copy)["commit"] == commit
    (copy / "rng.py").write_text("SEED = 2\n")
    assert origin.code_of(copy)["commit"] == f"{commit}+changes"


@pytest.mark.skipif(dispatch.UNAVAILABLE is not None, reason="no kernels")
def test_the_kernels_say_what_they_were_built_from() -> None:
    assert len(dispatch.sources()) == 64


def test_origin_has_what_a_record_needs() -> None:
    record = origin.origin()
    assert record["versions"].keys() >= {"python", "torch", "zerofl"}
    assert record["code"]["sources_sha256"] == origin.sources_sha256(PACKAGE)
    assert "cores" in record["machine"]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("cpu family\t: 25\nmodel\t\t: 1\nmodel name\t: AMD EPYC\n\nmodel\t\t: 2\n", "AMD EPYC (family 25, model 1)"),
        ("model name\t: Some ARM\n", "Some ARM"),
        ("processor\t: 0\nCPU part\t: 0xd0b\n", platform.processor() or platform.machine()),
        (None, platform.processor() or platform.machine()),
    ],
)
def test_a_machine_is_told_by_its_processors_generation(
    text: str | None, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(origin, "CPUINFO", tmp_path / "cpuinfo")
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    assert origin.machine() == f"{name}, {os.cpu_count()} cores"
