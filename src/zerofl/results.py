"""A run's folder: what it did so far, written so that a kill at any moment loses at most the round in progress.

experiment.toml         the experiment, every value settled
rounds.jsonl            a line for each round
clients.jsonl           a line for each usable update
checkpoint.safetensors  the state after the last whole round; gone once the run is finished
snapshots/              the sparse layers' aggregated weights after some rounds, if the experiment asks for them
model.safetensors       the final model
summary.json            the figures of the whole run; it exists exactly when the run is finished
"""

import dataclasses
import fcntl
import json
import os
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import tomli_w
import torch
from safetensors import SafetensorError, safe_open

from zerofl import native
from zerofl.experiment import Experiment, ExperimentError, differing_keys, make_experiment
from zerofl.origin import origin
from zerofl.uplink import State

EXPERIMENT, ROUNDS, CLIENTS, CHECKPOINT, SNAPSHOTS, MODEL, SUMMARY, LOCK = (
    "experiment.toml",
    "rounds.jsonl",
    "clients.jsonl",
    "checkpoint.safetensors",
    "snapshots",
    "model.safetensors",
    "summary.json",
    ".lock",
)


SWEEP = "sweep.toml"
"""In the folder above the runs: the file they are of."""


class ResultsError(Exception):
    """A run's folder that cannot be started, resumed or read; the message says what to do."""


class Checkpoint(NamedTuple):
    """The whole state of a run after `round`: all randomness is a function of the seed and the round.

    `data_sha256` is the checksum of the data it was trained on.
    """

    round: int
    state: State
    optimizer_state: State
    data_sha256: str


def check_run(directory: Path, experiment: Experiment, resume: bool) -> Experiment:
    """Whether `experiment` can run in this folder, before anything is written; returns it with its threads settled.

    Raises:
        ResultsError: there is a run already and `resume` is not set, or it is a run of another experiment, or its
            settings are gone.
    """
    if not (directory / EXPERIMENT).exists():
        if left := [file for file in (ROUNDS, CHECKPOINT, SUMMARY) if (directory / file).exists()]:
            raise ResultsError(
                f"{directory} has {' and '.join(left)} of a run, but not its {EXPERIMENT}: restore that, move the "
                "folder away, or write elsewhere with --out"
            )
        return dataclasses.replace(experiment, threads=experiment.threads or torch.get_num_threads())
    if not resume:
        raise ResultsError(
            f"{directory} holds a run already: go on with --resume, write elsewhere with --out, or remove it"
        )
    stored = read_experiment(directory)
    experiment = dataclasses.replace(experiment, threads=experiment.threads or stored.threads)
    if differences := differing_keys(stored, experiment):
        raise ResultsError(
            f"{directory} holds a run with other settings, theirs and the new: {'; '.join(differences)}. "
            "Write elsewhere with --out, or give the same settings"
        )
    return experiment


def open_run(directory: Path, experiment: Experiment) -> Checkpoint | None:
    """Start a run's folder, or take up the one that is there; returns where to go on, if it has come that far.

    Raises:
        OSError: the folder cannot be written; nothing was computed yet.
        ResultsError: the checkpoint is damaged, or rounds or updates before it have lost their lines.
    """
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / EXPERIMENT, tomli_w.dumps(dataclasses.asdict(experiment)).encode())
    for left in directory.rglob(".tmp*"):  # half a file, of a process that was killed while safetensors wrote it
        left.unlink()
    checkpoint = load_checkpoint(directory / CHECKPOINT) if (directory / CHECKPOINT).exists() else None
    done = checkpoint.round if checkpoint else 0
    kept = {file: _lines_until(directory / file, done) for file in (ROUNDS, CLIENTS)}
    rounds, clients = ([json.loads(line) for line in lines] for lines in kept.values())
    _check_lines(directory, rounds, clients, done)
    for file, lines in kept.items():
        if (directory / file).exists():
            write_atomically(directory / file, b"".join(lines))
    return checkpoint


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keep every other process from running into this folder; the lock ends with the process, however it ends.

    Raises:
        ResultsError: another process has it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ResultsError(f"{directory} is in use by another process; wait for it, or write elsewhere") from error
        yield


def is_finished(directory: Path) -> bool:
    """Whether the run in this folder has ended."""
    return (directory / SUMMARY).exists()


def read_experiment(directory: Path) -> Experiment:
    """The experiment of the run in this folder.

    Raises:
        ResultsError: the file is damaged.
    """
    path = directory / EXPERIMENT
    try:
        return make_experiment(tomllib.loads(path.read_text(encoding="utf-8-sig")))
    except (ExperimentError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise _damaged(str(path), "the settings of a run", error) from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a .jsonl file; none if it is not there yet.

    A last line that is cut short is left out: a run may be writing it.

    Raises:
        ResultsError: another line is damaged.
    """
    lines = path.read_bytes().splitlines() if path.exists() else []
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(_json_object(line))
        except ValueError as error:
            if number < len(lines):
                raise _damaged(f"{path}, line {number}", "a JSON object", error) from error
    return records


def read_summary(directory: Path) -> dict[str, Any]:
    """The summary of a finished run.

    Raises:
        ResultsError: the file is damaged.
    """
    path = directory / SUMMARY
    try:
        return _json_object(path.read_bytes())
    except ValueError as error:
        raise _damaged(str(path), "a JSON object", error) from error


def _json_object(text: bytes) -> dict[str, Any]:
    record = json.loads(text)
    if not isinstance(record, dict):
        raise ValueError(f"it is {type(record).__name__}")
    return record


def _damaged(where: str, expected: str, cause: object) -> ResultsError:
    cause = " ".join(str(cause).split())
    return ResultsError(
        f"{where}: expected {expected}, but it is damaged: {cause}. Restore the file, or move the run's folder away "
        "and run it again"
    )


def save_round(
    directory: Path, record: Mapping[str, Any], clients: list[dict[str, Any]], checkpoint: Checkpoint
) -> None:
    """Record a whole round. The lines go first: without its checkpoint a line is dropped and made again on resuming."""
    _append_lines(directory / ROUNDS, [record])
    _append_lines(directory / CLIENTS, clients)
    save_checkpoint(directory / CHECKPOINT, checkpoint)


def finish_run(directory: Path, state: State, full_model_bytes: int, more: Mapping[str, Any]) -> dict[str, Any]:
    """Write the final model and the summary with `more` in it, which marks the run as finished; returns the summary."""
    _save_tensors(directory / MODEL, state)
    summary = summarize(directory, full_model_bytes) | dict(more)
    write_atomically(directory / SUMMARY, (json.dumps(summary, indent=2, allow_nan=False) + "\n").encode())
    (directory / CHECKPOINT).unlink(missing_ok=True)
    return summary


def summarize(directory: Path, full_model_bytes: int) -> dict[str, Any]:
    """The figures of a whole run, from its folder.

    `savings` is the paper's measure with measured bytes: what the same updates would take with the full model sent,
    over what was sent.
    """
    experiment = read_experiment(directory)
    rounds, clients = read_lines(directory / ROUNDS), read_lines(directory / CLIENTS)
    evaluated = [record for record in rounds if record.get("test_accuracy") is not None]
    best = max(evaluated, key=lambda record: record["test_accuracy"], default={})
    last = rounds[-1]
    return {
        "name": experiment.name,
        "rounds": last["round"],
        "test_accuracy": last.get("test_accuracy"),
        "test_loss": last.get("test_loss"),
        "validation_accuracy": last.get("validation_accuracy"),
        "best_test_accuracy": best.get("test_accuracy"),
        "best_round": best.get("round"),
        "uplink_bytes": sum(record["uplink_bytes"] for record in rounds),
        "downlink_bytes": sum(record["downlink_bytes"] for record in rounds),
        "updates": len(clients),
        "full_model_bytes": full_model_bytes,
        "savings": full_model_bytes * len(clients) / sum(client["uplink_bytes"] for client in clients),
        "failures": sum(len(record["failures"]) for record in rounds),
        "seconds": sum(record["seconds"] for record in rounds),
        "train_seconds": sum(record["train_seconds"] for record in rounds),
        "threads": experiment.threads,
        "kernels": _kernels(experiment),
        **origin(),
    }


def _kernels(experiment: Experiment) -> str:
    """The instruction set of the kernels that trained, or why it was the reference."""
    if native.UNAVAILABLE:
        return f"reference: {native.UNAVAILABLE}"
    if experiment.device != "cpu" or experiment.precision != "float32":
        return f"reference: {experiment.precision} on {experiment.device}"
    return native.isa()


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint in place of the one before, atomically."""
    tensors = {f"state/{name}": tensor for name, tensor in checkpoint.state.items()}
    tensors |= {f"optimizer/{name}": tensor for name, tensor in checkpoint.optimizer_state.items()}
    metadata = {"round": str(checkpoint.round), "data_sha256": checkpoint.data_sha256}
    _save_tensors(path, tensors, metadata)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint; its tensors come in the file's order, not the model's.

    Raises:
        ResultsError: the file is damaged.
    """
    parts: dict[str, State] = {"state": {}, "optimizer": {}}
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                part, _, name = key.partition("/")
                parts[part][name] = file.get_tensor(key)
            metadata = file.metadata()
        return Checkpoint(int(metadata["round"]), parts["state"], parts["optimizer"], metadata["data_sha256"])
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise _damaged(str(path), "a run's state after a round", error) from error


def save_snapshot(directory: Path, round: int, weights: State) -> None:
    """Keep some weights of a round, by layer."""
    (directory / SNAPSHOTS).mkdir(exist_ok=True)
    _save_tensors(directory / SNAPSHOTS / f"round-{round:05d}.safetensors", weights)


def read_snapshots(directory: Path) -> dict[int, State]:
    """The kept weights of a run, by round.

    Raises:
        ResultsError: a file is damaged.
    """
    return {
        _round_of(path): _read_tensors(path) for path in sorted((directory / SNAPSHOTS).glob("round-*.safetensors"))
    }


def _round_of(snapshot: Path) -> int:
    number = snapshot.stem.removeprefix("round-")
    if not number.isdecimal():
        raise ResultsError(f"{snapshot}: expected a name such as round-00020.safetensors; take the file away")
    return int(number)


def _read_tensors(path: Path) -> State:
    try:
        return safetensors.torch.load_file(path)
    except SafetensorError as error:
        raise _damaged(str(path), "the kept weights of a round", error) from error


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that after a kill or a power cut it is either as it was before, or whole."""
    with _replacing(path) as temporary:
        temporary.write_bytes(data)


def _save_tensors(path: Path, tensors: State, metadata: dict[str, str] | None = None) -> None:
    """`write_atomically` of a safetensors file, without a copy of it in memory."""
    with _replacing(path) as temporary:
        try:
            safetensors.torch.save_file(tensors, temporary, metadata)
        except SafetensorError as error:  # which is how it reports a full disk
            raise OSError(str(error)) from error


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A file to write beside `path`, which takes its place when it is on the disk whole."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.unlink(missing_ok=True)  # that of a killed process
        temporary.touch()
        mode = temporary.stat().st_mode  # as the umask wants it: safetensors' own files are for nobody else to read
        yield temporary
        temporary.chmod(mode)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
    except OSError:  # a full disk gets back what was half written
        temporary.unlink(missing_ok=True)
        raise
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _append_lines(path: Path, records: list[dict[str, Any]] | list[Mapping[str, Any]]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(record, allow_nan=False) + "\n" for record in records)
        file.flush()
        os.fsync(file.fileno())


def _check_lines(directory: Path, rounds: list[dict[str, Any]], clients: list[dict[str, Any]], done: int) -> None:
    """Whether the rounds up to the checkpoint's have their lines, and those the updates they count."""
    if [record["round"] for record in rounds] != list(range(1, done + 1)):
        have = f"it has {len(rounds)}"
        raise _damaged(str(directory / ROUNDS), f"a line for each of the rounds 1 to {done}", have)
    examples = Counter[int]()
    for client in clients:
        count = client.get("num-examples")
        examples[client["round"]] += count if isinstance(count, int) else 0
    for record in rounds:
        if record["examples"] != examples[record["round"]]:
            expected = f"updates on {record['examples']} samples in round {record['round']}"
            have = f"it has updates on {examples[record['round']]}"
            raise _damaged(str(directory / CLIENTS), expected, have)


def _lines_until(path: Path, round: int) -> list[bytes]:
    """The lines up to a round's: later ones have no checkpoint, a half-written last line among them."""
    kept = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            if _json_object(line)["round"] <= round:
                kept.append(line + b"\n")
        except (ValueError, KeyError, TypeError):
            break
    return kept
