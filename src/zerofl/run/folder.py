"""A run's folder: what it did so far, written so that a kill at any moment loses at most the round in progress.

experiment.toml         the experiment, every value settled
rounds.jsonl            a line for each round
clients.jsonl           a line for each usable update
checkpoint.safetensors  the state after the last whole round; gone once the run is finished
snapshots/              the sparse layers' aggregated weights after some rounds, if the experiment asks for them
model.safetensors       the final model, with the experiment in its metadata
summary.json            the figures of the whole run; it exists exactly when the run is finished
"""

import dataclasses
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import safetensors.torch
import tomli_w
import torch
from safetensors import SafetensorError, safe_open

from zerofl.data.temporary import folder_beside
from zerofl.exchange.uplink import State
from zerofl.experiment import WHERE, Experiment, ExperimentError, differing_keys, make_experiment
from zerofl.run.origin import code, origin
from zerofl.sparse import kernels

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

EXPERIMENT_KEY = "experiment"
"""In a model's metadata: the experiment as JSON, without the keys that say where it ran."""


class ResultsError(Exception):
    """A run's folder that cannot be started, resumed or read; the message says what to do."""


class Checkpoint(NamedTuple):
    """The whole state of a run after `round`: all randomness is a function of the seed and the round.

    `data_sha256` is the checksum of the data it was trained on, `sources_sha256` those of all code that made a round of
    it, the latest last: see `zerofl.run.origin.code`. Of a checkpoint that does not say it is UNKNOWN.
    """

    round: int
    state: State
    optimizer_state: State
    data_sha256: str
    sources_sha256: tuple[str, ...] = ()


UNKNOWN = "unknown"


def check_run(directory: Path, experiment: Experiment, resume: bool) -> Experiment:
    """Whether `experiment` can run in this folder, before anything is written; returns it with its threads settled.

    Raises:
        ResultsError: there is a run already and `resume` is not set, or it is a run of another experiment, or its
            settings are gone, or it is finished and its summary is damaged.
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
    if is_finished(directory):
        _check_summary(directory, stored)
    return experiment


def _check_summary(directory: Path, experiment: Experiment) -> None:
    """Raise unless a finished run's summary is of this run, and has the figures that are shown of it."""
    path, summary = directory / SUMMARY, read_summary(directory)
    for key in ("rounds", "test_accuracy", "uplink_bytes", "savings", "train_seconds", "seconds"):
        value = summary.get(key)
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise _damaged(str(path), f"{key}, a number", f"it has {value!r:.80}" if key in summary else "it has none")
    of, found = (experiment.name, experiment.rounds), (summary.get("name"), summary["rounds"])
    if found != of:
        raise _damaged(str(path), f"{of[1]} rounds of {of[0]!r}", f"it has {found[1]!r} of {found[0]!r:.80}")


def open_run(
    directory: Path, experiment: Experiment, report: Callable[[str], None] = lambda line: None
) -> Checkpoint | None:
    """Start a run's folder, or take up the one that is there; returns where to go on, if it has come that far.

    `report` is given a line for what somebody should know who goes on: rounds that are run again, other code.

    Raises:
        OSError: the folder cannot be written; nothing was computed yet.
        ResultsError: the checkpoint is damaged or gone, or rounds or updates before it have lost their lines.
    """
    directory.mkdir(parents=True, exist_ok=True)
    _remove_halves(directory)
    write_atomically(directory / EXPERIMENT, tomli_w.dumps(dataclasses.asdict(experiment)).encode())
    checkpoint = load_checkpoint(directory / CHECKPOINT) if (directory / CHECKPOINT).exists() else None
    done, recorded = checkpoint.round if checkpoint else 0, _last_recorded(directory)
    if not checkpoint and recorded > 1:
        raise ResultsError(
            f"{directory} has records up to round {recorded}, but its {CHECKPOINT}, from which to go on, is gone: "
            "restore the file, or move the run's folder away and run it again"
        )
    kept = {file: _lines_until(directory / file, done) for file in (ROUNDS, CLIENTS)}
    rounds, clients = ([json.loads(line) for line in lines] for lines in kept.values())
    _check_lines(directory, rounds, clients, done)
    for file, lines in kept.items():
        if (directory / file).exists():
            write_atomically(directory / file, b"".join(lines))
    for line in _notes(checkpoint, recorded):
        report(line)
    return checkpoint


def _last_recorded(directory: Path) -> int:
    """The last round of which there is a record or a snapshot; 0 without any."""
    rounds = [0, *(_round_of(path) for path in _snapshots(directory))]
    for file in (ROUNDS, CLIENTS):
        for line in (directory / file).read_bytes().splitlines() if (directory / file).exists() else []:
            with suppress(ValueError, KeyError):  # cut short, or damaged
                rounds.append(_json_object(line)["round"])
    return max(round for round in rounds if type(round) is int)


def _notes(checkpoint: Checkpoint | None, recorded: int) -> Iterator[str]:
    """What somebody who goes on should know."""
    done = checkpoint.round if checkpoint else 0
    if recorded > done:
        yield f"records go up to round {recorded}, without its checkpoint: run again from round {done + 1}"
    sources, now = checkpoint.sources_sha256[-1:] if checkpoint else (), code()["sources_sha256"]
    if sources == (UNKNOWN,):
        yield f"{CHECKPOINT} is of an earlier version, which wrote no checksum: damaged weights would not be noticed"
    elif sources not in ((), (now,)):
        yield f"round {done} was made by other code: its sources have SHA-256 {sources[0]:.16}…, those now {now:.16}…"


def _remove_halves(directory: Path) -> None:
    """Remove what killed processes left half written. Nobody else writes here: see `locked`."""
    for left in [path for name in ("*.tmp", ".tmp*") for path in directory.rglob(name)]:  # .tmp*: safetensors' own
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink(missing_ok=True)


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
    _save_tensors(directory / MODEL, state, {EXPERIMENT_KEY: _settings(read_experiment(directory))})
    summary = summarize(directory, full_model_bytes) | dict(more)
    write_atomically(directory / SUMMARY, (json.dumps(summary, indent=2, allow_nan=False) + "\n").encode())
    (directory / CHECKPOINT).unlink(missing_ok=True)
    return summary


def read_model(file: Path) -> tuple[Experiment, State]:
    """A run's final model and the experiment that made it, from the file's metadata.

    A file that was written before these were there has them beside it, in experiment.toml.

    Raises:
        ResultsError: the file is damaged, or has no experiment.
    """
    state, metadata = _load_tensors(file, "a run's final model")
    if EXPERIMENT_KEY in metadata:
        try:
            return make_experiment(_json_object(metadata[EXPERIMENT_KEY].encode())), state
        except ValueError as error:
            raise _damaged(str(file), "a run's final model", error) from error
    if not (file.parent / EXPERIMENT).exists():
        raise ResultsError(
            f"{file} does not say what it was trained with, and no {EXPERIMENT} is beside it: expected the "
            f"model of a run of zerofl; put the run's {EXPERIMENT} there"
        )
    return read_experiment(file.parent), state


def _settings(experiment: Experiment) -> str:
    values = dataclasses.asdict(experiment)
    return json.dumps({key: value for key, value in values.items() if key not in WHERE})


def summarize(directory: Path, full_model_bytes: int) -> dict[str, Any]:
    """The figures of a whole run, from its folder.

    `uplink_bytes` are those of the usable updates; the payloads that were refused have their own sum. Records of
    earlier versions lack that one, and CPU seconds: both are then None.
    """
    experiment = read_experiment(directory)
    rounds, clients = read_lines(directory / ROUNDS), read_lines(directory / CLIENTS)
    evaluated = [record for record in rounds if record.get("test_accuracy") is not None]
    best = max(evaluated, key=lambda record: record["test_accuracy"], default={})
    last = rounds[-1]
    uplink_bytes = sum(client["uplink_bytes"] for client in clients)
    return {
        "name": experiment.name,
        "rounds": last["round"],
        "test_accuracy": last.get("test_accuracy"),
        "test_loss": last.get("test_loss"),
        "validation_accuracy": last.get("validation_accuracy"),
        "best_test_accuracy": best.get("test_accuracy"),
        "best_round": best.get("round"),
        "uplink_bytes": uplink_bytes,
        "refused_bytes": _sum(rounds, "refused_bytes"),
        "downlink_bytes": sum(record["downlink_bytes"] for record in rounds),
        "updates": len(clients),
        "full_model_bytes": full_model_bytes,
        "savings": savings(full_model_bytes, len(clients), uplink_bytes),
        "failures": sum(len(record["failures"]) for record in rounds),
        "seconds": sum(record["seconds"] for record in rounds),
        "train_seconds": sum(record["train_seconds"] for record in rounds),
        "train_cpu_seconds": _sum(rounds, "train_cpu_seconds"),
        "threads": experiment.threads,
        "kernels": _kernels(experiment),
        **origin(),
    }


def savings(full_model_bytes: int, updates: int, uplink_bytes: int) -> float:
    """The paper's measure with measured bytes: what the updates would take as full models, over what they took.

    `full_model_bytes` is the model's size as its numbers are; `uplink_bytes` the length of the `updates` that were
    used.
    """
    return full_model_bytes * updates / uplink_bytes


def _sum(records: list[dict[str, Any]], key: str) -> Any:
    """The sum of a figure over all records, or None if one of them was made before it was recorded."""
    return sum(record[key] for record in records) if all(key in record for record in records) else None


def _kernels(experiment: Experiment) -> str:
    """The instruction set of the kernels that trained, or why it was the reference."""
    if kernels.UNAVAILABLE:
        return f"reference: {kernels.UNAVAILABLE}"
    if experiment.device != "cpu" or experiment.precision != "float32":
        return f"reference: {experiment.precision} on {experiment.device}"
    return kernels.isa()


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint in place of the one before, atomically."""
    tensors = {f"state/{name}": tensor for name, tensor in checkpoint.state.items()}
    tensors |= {f"optimizer/{name}": tensor for name, tensor in checkpoint.optimizer_state.items()}
    metadata = {
        "round": str(checkpoint.round),
        "data_sha256": checkpoint.data_sha256,
        "sources_sha256": " ".join(checkpoint.sources_sha256),
    }
    _save_tensors(path, tensors, metadata)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint; its tensors come in the file's order, not the model's.

    Raises:
        ResultsError: the file is damaged: it is none, or does not agree with the checksum in it.
    """
    expected = "a run's state after a round"
    tensors, metadata = _load_tensors(path, expected)
    parts: dict[str, State] = {"state": {}, "optimizer": {}}
    try:
        for key, tensor in tensors.items():
            part, _, name = key.partition("/")
            parts[part][name] = tensor
        code = tuple(metadata.get("sources_sha256", UNKNOWN).split())
        return Checkpoint(int(metadata["round"]), parts["state"], parts["optimizer"], metadata["data_sha256"], code)
    except (KeyError, ValueError) as error:
        raise _damaged(str(path), expected, error) from error


def save_snapshot(directory: Path, round: int, weights: State) -> None:
    """Keep some weights of a round, by layer."""
    (directory / SNAPSHOTS).mkdir(exist_ok=True)
    _save_tensors(directory / SNAPSHOTS / f"round-{round:05d}.safetensors", weights)


def read_snapshots(directory: Path) -> dict[int, State]:
    """The kept weights of a run, by round.

    Raises:
        ResultsError: a file is damaged.
    """
    return {_round_of(path): _load_tensors(path, "the kept weights of a round")[0] for path in _snapshots(directory)}


def _snapshots(directory: Path) -> list[Path]:
    return sorted((directory / SNAPSHOTS).glob("round-*.safetensors"))


def _round_of(snapshot: Path) -> int:
    number = snapshot.stem.removeprefix("round-")
    if not number.isdecimal():
        raise ResultsError(f"{snapshot}: expected a name such as round-00020.safetensors; take the file away")
    return int(number)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that after a kill or a power cut it is either as it was before, or whole."""
    with _replacing(path) as temporary:
        temporary.write_bytes(data)


def _save_tensors(path: Path, tensors: State, metadata: Mapping[str, str] = MappingProxyType({})) -> None:
    """`write_atomically` of a safetensors file with a checksum in it, without a copy of it in memory."""
    with _replacing(path) as temporary:
        try:
            safetensors.torch.save_file(tensors, temporary, {**metadata, "sha256": _checksum(tensors, metadata)})
        except SafetensorError as error:  # which is how it reports a full disk
            number = re.search(r"\(os error (\d+)\)", str(error))
            if number is None:
                raise OSError(f"{path}: {error}") from error
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def _load_tensors(path: Path, expected: str) -> tuple[State, dict[str, str]]:
    """What `_save_tensors` wrote: tensors and metadata. Earlier versions wrote no checksum, nor anything with it.

    Raises:
        ResultsError: the file is damaged; `expected` says what it should be.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            metadata = dict(file.metadata() or {})
        checksum = metadata.pop("sha256", None)
        if (checksum or "sources_sha256" in metadata) and checksum != _checksum(tensors, metadata):
            raise ValueError("it does not agree with the checksum in it")
    except (SafetensorError, ValueError) as error:
        raise _damaged(str(path), expected, error) from error
    return tensors, metadata


def _checksum(tensors: State, metadata: Mapping[str, str]) -> str:
    """SHA-256 over names, types, shapes and values, and over the metadata."""
    digest = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A file to write, which takes the place of `path` when it is on the disk whole."""
    with folder_beside(path) as own:
        temporary = own / "new"
        temporary.touch()
        mode = temporary.stat().st_mode  # as the umask wants it: safetensors' own files are for nobody else to read
        yield temporary
        temporary.chmod(mode)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
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
