import errno
import io
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.run.folders import STATE, killed, save
from tests.running import client_record, experiment_of, round_record, run, run_until
from zerofl.data import dataset_checksum, load_dataset
from zerofl.experiment import Experiment
from zerofl.fl.train import initial_model
from zerofl.flower.client_app import app as client_app
from zerofl.flower.engines import InProcessGrid, rounds_on, run_in_process
from zerofl.flower.server_app import serve
from zerofl.run import folder
from zerofl.run.checkpoint import Checkpoint, load_checkpoint, save_checkpoint, save_snapshot
from zerofl.run.console import Output
from zerofl.run.files import CHECKPOINT, EXPERIMENT, ResultsError
from zerofl.run.one import run_one
from zerofl.run.origin import code
from zerofl.run.resume import check_free, check_run, locked, open_run


def line(round: int) -> str:
    return json.dumps(round_record(round, examples=2 * 30).to_json())


def rounds_in(path: Path) -> list[int]:
    return [record["round"] for record in folder.read_lines(path)]


def test_a_round_without_its_checkpoint_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_run(tmp_path, Experiment())
    save(tmp_path, 1)
    save(tmp_path, 2)
    with monkeypatch.context() as patch:
        patch.setattr("zerofl.run.folder.save_checkpoint", killed)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 3)
    with (tmp_path / "clients.jsonl").open("a") as file:
        file.write('{"round": 4, "cli')  # and a line cut short
    said: list[str] = []
    checkpoint = open_run(tmp_path, Experiment(), said.append)
    assert said == ["records go up to round 3, without its checkpoint: run again from round 3"]
    assert checkpoint is not None
    assert checkpoint.round == 2
    assert rounds_in(tmp_path / "rounds.jsonl") == [1, 2]
    assert rounds_in(tmp_path / "clients.jsonl") == [1, 1, 2, 2]
    save(tmp_path, 3)
    assert rounds_in(tmp_path / "rounds.jsonl") == [1, 2, 3]


def test_a_run_killed_before_its_first_checkpoint_starts_over(tmp_path: Path) -> None:
    open_run(tmp_path, Experiment())
    (tmp_path / "rounds.jsonl").write_text(line(1) + "\n")
    said: list[str] = []
    assert open_run(tmp_path, Experiment(), said.append) is None
    assert said == ["records go up to round 1, without its checkpoint: run again from round 1"]
    assert rounds_in(tmp_path / "rounds.jsonl") == []


@pytest.mark.parametrize("left", ["rounds.jsonl", "clients.jsonl", "snapshots"])
def test_what_was_computed_is_not_thrown_away_with_its_checkpoint(left: str, tmp_path: Path) -> None:
    """Two rounds are recorded, so a checkpoint of the first has been there."""
    open_run(tmp_path, Experiment())
    save(tmp_path, 1)
    save(tmp_path, 2)
    save_snapshot(tmp_path, 2, STATE)
    kept = {EXPERIMENT, left}
    for path in tmp_path.iterdir():
        if path.name not in kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ResultsError, match=r"records up to round 2, but its checkpoint\.safetensors, .* is gone"):
        open_run(tmp_path, Experiment())
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("rounds", "kept"),
    [("1 2", 2), ("1", 1), ("2", 1), ("", 0), ("1 1 2", 3), ("1 x 2", 1)],
)
def test_rounds_that_a_checkpoint_counts_on_must_be_there(rounds: str, kept: int, tmp_path: Path) -> None:
    open_run(tmp_path, Experiment())
    save(tmp_path, 1)
    save(tmp_path, 2)
    text = "\n".join(word if word == "x" else line(int(word)) for word in rounds.split())
    (tmp_path / "rounds.jsonl").write_text(text)
    if rounds == "1 2":
        open_run(tmp_path, Experiment())
        save(tmp_path, 3)  # even behind a last line without its end
        assert rounds_in(tmp_path / "rounds.jsonl") == [1, 2, 3]
    else:
        with pytest.raises(ResultsError, match=rf"expected a line for each of the rounds 1 to 2, .* it has {kept}\."):
            open_run(tmp_path, Experiment())
        assert (tmp_path / "rounds.jsonl").read_text() == text  # left as it is, to be mended


@pytest.mark.parametrize("damage", ["", "1 1 2", "x 1 2 2", "1 1 1 2 2"])
def test_updates_that_a_round_counts_must_be_there(damage: str, tmp_path: Path) -> None:
    open_run(tmp_path, Experiment())
    save(tmp_path, 1)
    save(tmp_path, 2)
    lines = [w if w == "x" else json.dumps(client_record(int(w), 1, 30).to_json()) for w in damage.split()]
    (tmp_path / "clients.jsonl").write_text("\n".join(lines))
    with pytest.raises(ResultsError, match=r"clients\.jsonl: expected updates on 60 samples in round \d"):
        open_run(tmp_path, Experiment())


@pytest.mark.parametrize("left", ["rounds.jsonl", "checkpoint.safetensors", "summary.json"])
def test_a_run_without_its_settings_is_not_taken_over(left: str, tmp_path: Path) -> None:
    (tmp_path / left).write_text("")
    for resume in (False, True):
        with pytest.raises(ResultsError, match=f"has {left} of a run, but not its experiment.toml"):
            check_run(tmp_path, Experiment(), resume)


@pytest.mark.parametrize(
    ("spoil", "cause"),
    [
        (lambda c: c.state.popitem(), "its tensors have other names"),
        (lambda c: c.state.update({"more": torch.zeros(1)}), "its tensors have other names"),
        (lambda c: c.state.update({"fc2.bias": torch.zeros(3)}), "its tensors have other names"),
        (lambda c: c.state["fc2.bias"].fill_(torch.nan), "fc2.bias holds non-finite values"),
        (lambda c: c.optimizer_state.popitem(), "the optimiser's tensors have other names"),
    ],
)
def test_a_checkpoint_of_another_model_is_not_gone_on_from(
    spoil: Callable[[Checkpoint], object], cause: str, cifar_root: Path, tmp_path: Path
) -> None:
    experiment = experiment_of(cifar_root, model="leaf_cnn", server_optimizer="fedadam")
    state = initial_model(experiment, load_dataset(experiment.dataset, experiment.root)).state_dict()
    moments = {f"{m}.{name}": torch.zeros_like(tensor) for m in "mv" for name, tensor in state.items()}
    checksum = dataset_checksum(experiment.dataset, experiment.root)
    checkpoint = Checkpoint(1, dict(state), moments, checksum)
    spoil(checkpoint)
    with pytest.raises(ResultsError, match=f"checkpoint.safetensors: expected the experiment's model, but {cause}"):
        serve(InProcessGrid(client_app, 1), experiment, tmp_path, checkpoint, lambda record: None)


def test_the_record_names_all_code_that_made_rounds(cifar_root: Path, tmp_path: Path) -> None:
    """The first round is made by this code, the second is said to be by another, the third is by this again."""
    experiment, now = experiment_of(cifar_root, width=1), code()["sources_sha256"]
    run_until(experiment, tmp_path, 1)
    first = load_checkpoint(tmp_path / CHECKPOINT)
    assert first.sources_sha256 == (now,)
    save_checkpoint(tmp_path / CHECKPOINT, first._replace(sources_sha256=(now, "f" * 64)))
    said: list[str] = []
    open_run(tmp_path, experiment, said.append)
    assert said == [f"round 1 was made by other code: its sources have SHA-256 ffffffffffffffff…, those now {now:.16}…"]
    run_until(experiment, tmp_path, 2)
    assert load_checkpoint(tmp_path / CHECKPOINT).sources_sha256 == ("f" * 64, now)
    run(experiment, tmp_path)
    assert folder.read_summary(tmp_path).code == code() | {"earlier_sources_sha256": ["f" * 64]}
    assert folder.read_summary(run(experiment, tmp_path / "whole")).code == code()


def test_a_run_is_not_overwritten_nor_mixed_with_another(tmp_path: Path) -> None:
    started = check_run(tmp_path, Experiment(seed=1), resume=False)
    assert not list(tmp_path.iterdir())  # a check writes nothing
    open_run(tmp_path, started)
    assert check_run(tmp_path, Experiment(seed=2), resume=False).seed == 2  # it failed before its first round
    save(tmp_path, 1)
    with pytest.raises(ResultsError, match="holds a run already: resume it with --resume"):
        check_run(tmp_path, Experiment(seed=1), resume=False)
    with pytest.raises(ResultsError, match=r"other settings, theirs and the new: seed = 1 and 2; rounds = 700 and 5\."):
        check_run(tmp_path, Experiment(seed=2, rounds=5), resume=True)


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        ({"rounds": None}, "has no rounds, expected a whole number of 0 or more"),
        ({"savings": "much"}, "savings = 'much': expected a positive number"),
        ({"test_accuracy": math.nan}, r"test_accuracy = nan: expected a number in \[0, 1\], or null"),
        ({"format": 2}, "format = 2: this version of zerofl reads up to 1; install a later one"),
        ({"rounds": 6}, "it has 6 of 'run'"),
        ({"name": "x"}, "it has 7 of 'x'"),
    ],
)
def test_a_damaged_summary_is_named_before_anything_is_run(damage: dict[str, Any], cause: str, tmp_path: Path) -> None:
    experiment = check_run(tmp_path, Experiment(rounds=7), resume=False)
    open_run(tmp_path, experiment)
    figures = dict.fromkeys(("test_accuracy", "savings", "train_seconds", "seconds"), 0.5)
    counts = dict.fromkeys(("uplink_bytes", "downlink_bytes", "updates", "full_model_bytes", "failures", "threads"), 5)
    summary = figures | counts | {"name": "run", "rounds": 7, "machine": "", "versions": {}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert check_run(tmp_path, experiment, resume=True) == experiment
    damaged = {key: value for key, value in (summary | damage).items() if value is not None}
    (tmp_path / "summary.json").write_text(json.dumps(damaged))
    with pytest.raises(ResultsError, match=rf"summary\.json: expected .*, but it is damaged: {cause}\. Restore"):
        check_run(tmp_path, experiment, resume=True)


def test_a_run_resumes_where_its_data_has_moved(tmp_path: Path) -> None:
    open_run(tmp_path, check_run(tmp_path, Experiment(root="before"), resume=False))
    assert check_run(tmp_path, Experiment(root="after"), resume=True).root == "after"


def test_the_number_of_threads_is_settled_once(tmp_path: Path) -> None:
    started = check_run(tmp_path, Experiment(threads=0), resume=False)
    assert started.threads == torch.get_num_threads()
    open_run(tmp_path, started)
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        # Not by a run that failed before its first round.
        assert check_run(tmp_path, Experiment(threads=0), resume=True).threads == before + 1
        save(tmp_path, 1)
        assert check_run(tmp_path, Experiment(threads=0), resume=True) == started
    finally:
        torch.set_num_threads(before)


def test_a_lock_that_cannot_be_taken_is_named_with_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    check_free(tmp_path)  # nobody was here
    with locked(tmp_path):
        pass
    check_free(tmp_path)
    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.raises(ResultsError, match=rf"^{tmp_path}: .*No locks available.*--out"):
        check_free(tmp_path)


def test_the_checkpoint_of_a_finished_run_goes(cifar_root: Path, tmp_path: Path) -> None:
    """Of one that was killed between its summary and the end."""
    experiment = experiment_of(cifar_root, rounds=1)
    run(experiment, tmp_path)
    (tmp_path / CHECKPOINT).touch()
    assert not run_one(tmp_path, experiment, True, rounds_on(run_in_process), Output(io.StringIO()))
    assert not (tmp_path / CHECKPOINT).exists()


def test_an_unwritable_folder_is_an_error_before_anything_else(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        open_run(tmp_path / "file" / "run", Experiment())


def test_a_last_line_that_is_being_written_is_not_read(tmp_path: Path) -> None:
    """Cut at any byte, the file has the lines that are whole; one that only lacks its end of line is."""
    lines = [line(round).encode() + b"\n" for round in (1, 2)]
    path = tmp_path / "rounds.jsonl"
    for cut in range(len(lines[1]) + 1):
        path.write_bytes(lines[0] + lines[1][:cut])
        assert rounds_in(path) == ([1, 2] if cut >= len(lines[1]) - 1 else [1])
