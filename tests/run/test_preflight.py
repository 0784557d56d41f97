"""A run that will not find room is refused before anything is computed."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.running import experiment_of, run, run_until
from zerofl.cli import main
from zerofl.run.files import ResultsError
from zerofl.run.room import check_room, room_of


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def disk(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2 * free, free, free))


@pytest.mark.parametrize(("server", "states"), [({"server_optimizer": "fedadam"}, 3), ({"average_decay": 0.9}, 2)])
def test_a_run_takes_no_more_than_foreseen(
    server: dict[str, Any], states: int, cifar_root: Path, tmp_path: Path
) -> None:
    experiment = experiment_of(cifar_root, snapshot_every=1, **server)
    run(experiment, tmp_path / "run")
    taken = sum(path.stat().st_size for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert 0.5 * room_of(experiment).kept < taken <= room_of(experiment).kept
    checkpoint = states * (tmp_path / "run" / "model.safetensors").stat().st_size
    assert room_of(experiment).passing == pytest.approx(2 * checkpoint, rel=0.1)


def test_a_disk_too_small_is_refused(cifar_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = experiment_of(cifar_root)
    needed = 2 * room_of(experiment).kept + room_of(experiment).passing
    disk(monkeypatch, needed)
    check_room(tmp_path, [experiment, experiment])
    disk(monkeypatch, needed - 1)
    with pytest.raises(ResultsError, match=r"its disk has \d+ MB left, and the runs take up to \d+ MB; make room"):
        check_room(tmp_path, [experiment, experiment])


def test_what_a_run_has_there_already_counts_as_its_room(
    cifar_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs of which the first stopped after its second round: its checkpoint, records and snapshots are there."""
    experiment = experiment_of(cifar_root, snapshot_every=1, name="first")
    other = experiment_of(cifar_root, snapshot_every=1, name="other")

    directory = tmp_path / "first"
    run_until(experiment, directory, 2)
    there = sum(
        path.stat().st_size
        for name in ("checkpoint.safetensors", "rounds.jsonl", "clients.jsonl", "snapshots/*")
        for path in directory.glob(name)
    )
    assert there > room_of(experiment).passing / 2
    needed = 2 * room_of(experiment).kept + room_of(experiment).passing - there
    disk(monkeypatch, needed)
    check_room(tmp_path, [experiment, other])
    half = directory / "checkpoint.safetensors.of-a-killed-process.tmp" / "new"  # which goes
    half.parent.mkdir()
    half.write_bytes(b"0" * 1000)
    disk(monkeypatch, needed - 1000)
    check_room(tmp_path, [experiment, other])
    disk(monkeypatch, needed - 1001)
    with pytest.raises(ResultsError, match="make room"):
        check_room(tmp_path, [experiment, other])


def test_the_first_run_of_all_may_need_the_most_room(
    cifar_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large, small = experiment_of(cifar_root, width=8), experiment_of(cifar_root, name="small")
    needed = room_of(large).kept + room_of(large).passing
    assert room_of(large).passing > room_of(small).kept + room_of(small).passing
    disk(monkeypatch, needed)
    check_room(tmp_path, [large, small])
    disk(monkeypatch, needed - 1)
    with pytest.raises(ResultsError, match="make room"):
        check_room(tmp_path, [large, small])


@pytest.mark.parametrize(
    ("number", "fix"),
    [
        (errno.ENOSPC, "Make room"),
        (errno.EDQUOT, "Make room"),
        (errno.EACCES, "Give yourself the right to write there"),
        (errno.EROFS, "Make that disk writable"),
        (errno.EMFILE, r"Raise the limit of open files \(ulimit -n\)"),
        (errno.ENAMETOOLONG, "Choose a shorter name or folder"),
        (errno.EIO, "See to that"),
    ],
)
def test_an_error_of_the_system_comes_with_its_own_fix(
    number: int, fix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(**_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("tempfile.TemporaryFile", broken)
    with pytest.raises(
        ResultsError, match=rf"cannot be written there: \[Errno {number}\] {os.strerror(number)}\. {fix}"
    ):
        check_room(tmp_path, [])


def test_an_unwritable_folder_stops_all_runs_before_the_first(
    cifar_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_text('[base]\nclients = 5\nclients_per_round = 3\n[[run]]\nname = "run"\n')
    arguments = ["run", str(file), "--root", str(cifar_root)]
    assert main([*arguments, "--out", str(file / "out")]) == 2
    assert f"{file / 'out'}: results cannot be written there" in capsys.readouterr().err
    disk(monkeypatch, 1_000_000)
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    assert "its disk has 1 MB left, and the runs take up to" in capsys.readouterr().err
    assert not (tmp_path / "out" / "run").exists()


def test_a_disk_that_fills_names_the_run_and_how_to_go_on(
    cifar_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file.toml"
    file.write_text('[base]\nclients = 5\nclients_per_round = 3\nwidth = 4\nrounds = 2\n[[run]]\nname = "run"\n')
    arguments = ["run", str(file), "--root", str(cifar_root), "--out", str(tmp_path / "out")]
    fsync = os.fsync

    def full_after_round_1(descriptor: int) -> None:
        if (tmp_path / "out" / "run" / "checkpoint.safetensors").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full_after_round_1)
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert f"zerofl: run run: {tmp_path / 'out' / 'run'}: [Errno 28] No space left on device" in said
    assert "rounds that are whole are safe there. Make room, then resume with: zerofl run" in said
    assert not list((tmp_path / "out").rglob("*.tmp"))

    def too_many_files(descriptor: int) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "fsync", too_many_files)
    assert main([*arguments, "--resume"]) == 2
    assert "are safe there. Raise the limit of open files (ulimit -n), then resume" in capsys.readouterr().err
    monkeypatch.undo()
    assert main([*arguments, "--resume"]) == 0
