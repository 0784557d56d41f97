"""What is being written has a name of its process's own, and what a killed process left of it goes."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from zerofl.data.disk_cache import cached
from zerofl.data.temporary import folder_beside
from zerofl.run.files import replacing, write_atomically


def test_two_processes_write_one_file_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second begins and ends while the first is at it: the file is whole at any time, and the later one's."""
    path = tmp_path / "sweep.toml"
    with replacing(path) as first:
        first.write_bytes(b"first")
        with monkeypatch.context() as second:
            second.setattr(os, "getpid", os.getppid)  # another living process
            write_atomically(path, b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_goes_and_a_living_ones_stays(tmp_path: Path) -> None:
    path = tmp_path / "a[1].toml"  # a name with a pattern's signs
    code = (
        "from pathlib import Path; from zerofl.data.temporary import folder_beside\n"
        f"with folder_beside(Path({str(path)!r})) as own:"
        " (own / 'new').write_text('half'); print(own.name, flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        half = tmp_path / writer.stdout.readline().decode().strip()
        try:
            write_atomically(path, b"")
            assert {entry.name for entry in tmp_path.iterdir()} == {path.name, half.name}
        finally:
            writer.kill()
    assert (half / "new").exists()  # as a killed process leaves it
    write_atomically(path, b"")
    assert list(tmp_path.iterdir()) == [path]


def test_another_machines_and_what_an_earlier_process_of_this_number_left(tmp_path: Path) -> None:
    """On a shared disk nobody here knows whether another machine's process lives."""
    path = tmp_path / "c"
    other = tmp_path / f"c.not-{platform.node()}-1.tmp"
    other.mkdir()
    with folder_beside(path) as own:
        pass
    own.mkdir()
    (own / "half").touch()
    with folder_beside(path) as again:
        assert again == own
        assert list(own.iterdir()) == []
    assert list(tmp_path.iterdir()) == [other]


def test_half_a_cached_file_goes_with_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZEROFL_CACHE", str(tmp_path))
    cached("made", [], lambda: {"x": torch.ones(1)})
    (file,) = tmp_path.iterdir()
    file.unlink()
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    half = tmp_path / f"{file.name}.{platform.node()}-{ended.pid}.tmp"
    half.mkdir()
    (half / ".tmpAb12Cd").write_bytes(b"half")  # as safetensors names what it writes
    cached("made", [], lambda: {"x": torch.ones(1)})
    assert list(tmp_path.iterdir()) == [file]
