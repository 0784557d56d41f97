"""Checkpoints: whole or not there, and every damage noticed."""

import contextlib
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.run.folders import MOMENTS, STATE, killed, save
from tests.running import experiment_of, run
from zerofl.experiment import Experiment
from zerofl.run import folder
from zerofl.run.checkpoint import UNKNOWN, Checkpoint, load_checkpoint, read_snapshots, save_checkpoint, save_snapshot
from zerofl.run.files import ResultsError, write_atomically
from zerofl.run.resume import open_run


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", Checkpoint(12, STATE, MOMENTS, "0123"))
    loaded = load_checkpoint(tmp_path / "c")
    assert (loaded.round, loaded.data_sha256) == (12, "0123")
    for saved, back in ((STATE, loaded.state), (MOMENTS, loaded.optimizer_state)):
        assert saved.keys() == back.keys()
        assert all(torch.equal(saved[name], back[name]) and saved[name].dtype == back[name].dtype for name in saved)


def test_a_kill_while_writing_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path / "c", Checkpoint(1, STATE, {}, "0123"))
    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path / "c", Checkpoint(2, STATE, {}, "0123"))
    assert load_checkpoint(tmp_path / "c").round == 1


@pytest.mark.parametrize("damage", [lambda b: b[:100], lambda b: b[:-9], lambda b: b"", lambda b: b"\xff" * 50])
def test_a_damaged_checkpoint_is_named(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    open_run(tmp_path, Experiment())
    save(tmp_path, 1)
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ResultsError, match=r"checkpoint\.safetensors: expected a run's state .* move the run's folder"):
        open_run(tmp_path, Experiment())


def test_one_flipped_bit_of_a_checkpoint_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, Checkpoint(1, STATE, MOMENTS, "0123", ("4567",)))
    whole = path.read_bytes()
    for byte in range(len(whole)):
        path.write_bytes(whole[:byte] + bytes([whole[byte] ^ 1 << byte % 8]) + whole[byte + 1 :])
        with pytest.raises(ResultsError, match=r"checkpoint\.safetensors: expected a run's state"):
            load_checkpoint(path)


def test_one_flipped_bit_of_kept_weights_is_noticed(tmp_path: Path) -> None:
    save_snapshot(tmp_path, 3, STATE)
    path = tmp_path / "snapshots" / "round-00003.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ResultsError, match="it does not agree with the checksum in it"):
        read_snapshots(tmp_path)


def test_a_checkpoint_of_an_earlier_version_is_gone_on_from(tmp_path: Path) -> None:
    open_run(tmp_path, Experiment())
    save(tmp_path, 1)
    state = {f"state/{name}": tensor for name, tensor in STATE.items()}
    save_file(state, tmp_path / "checkpoint.safetensors", {"round": "1", "data_sha256": "0123"})
    said: list[str] = []
    checkpoint = open_run(tmp_path, Experiment(), said.append)
    assert checkpoint is not None
    assert (checkpoint.round, checkpoint.sources_sha256) == (1, (UNKNOWN,))
    (note,) = said
    assert "is of an earlier version, which wrote no checksum" in note


def test_another_damaged_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "rounds.jsonl").write_text('{"round": 1}\n{"rou\n{"round": 3}\n')
    with pytest.raises(ResultsError, match=r"rounds\.jsonl, line 2: expected a JSON object, but it is damaged"):
        folder.read_lines(tmp_path / "rounds.jsonl")


def test_a_dense_run_keeps_no_empty_snapshots(cifar_root: Path, tmp_path: Path) -> None:
    run(experiment_of(cifar_root, rounds=1, sparsity=0.0, uplink="full", snapshot_every=1), tmp_path / "dense")
    assert not (tmp_path / "dense" / "snapshots").exists()
    run(experiment_of(cifar_root, rounds=1, snapshot_every=1), tmp_path / "sparse")
    assert list(read_snapshots(tmp_path / "sparse")) == [1]


@contextlib.contextmanager
def files_of_at_most_16_kb() -> Iterator[None]:
    """As on a disk that has no more room: a longer one cannot be written.

    Around the one call: pytest's own output may go to a longer file.
    """
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16_384, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_checkpoint_without_room_leaves_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    save_checkpoint(path, Checkpoint(1, {"w": torch.ones(10)}, {}, "data"))
    cause = r"\[Errno 27\] File too large: .*checkpoint\.safetensors"
    with files_of_at_most_16_kb(), pytest.raises(OSError, match=cause):
        save_checkpoint(path, Checkpoint(2, {"w": torch.ones(10_000)}, {}, "data"))
    assert load_checkpoint(path).round == 1
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_half_a_checkpoint_of_a_killed_process_goes(tmp_path: Path) -> None:
    open_run(tmp_path, Experiment())
    (tmp_path / "snapshots").mkdir()
    for half in (tmp_path / ".tmpAb12Cd", tmp_path / "snapshots" / ".tmpAb12Cd"):
        half.write_bytes(b"half")
    open_run(tmp_path, Experiment())
    assert {file.name for file in tmp_path.rglob("*")} == {"experiment.toml", "snapshots"}


def test_files_may_be_read_by_whom_the_umask_allows(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save_checkpoint(tmp_path / "checkpoint", Checkpoint(1, STATE, {}, "data"))
        write_atomically(tmp_path / "text", b"")
    finally:
        os.umask(before)
    assert {(tmp_path / name).stat().st_mode & 0o777 for name in ("checkpoint", "text")} == {0o640}
