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
import json
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from zerofl.exchange.update import State
from zerofl.experiment import WHERE, Experiment, ExperimentError, make_experiment
from zerofl.fl import energy
from zerofl.fl.records import ClientRecord, RoundRecord, Summary, savings, total
from zerofl.run.checkpoint import Checkpoint, load_tensors, save_checkpoint, save_snapshot, save_tensors
from zerofl.run.files import (
    CHECKPOINT,
    CLIENTS,
    EXPERIMENT,
    EXPERIMENT_KEY,
    MODEL,
    ROUNDS,
    SUMMARY,
    ResultsError,
    append_lines,
    damaged,
    lines_of,
    write_atomically,
)
from zerofl.run.origin import origin
from zerofl.sparse import dispatch

R = TypeVar("R", RoundRecord, ClientRecord)


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
        raise damaged(str(path), "the settings of a run", error) from error


def read_rounds(directory: Path) -> list[RoundRecord]:
    """The records of a run's rounds so far.

    Raises:
        ResultsError: a line is damaged, but for the last one if it is cut short, or is not that of its round.
    """
    path = directory / ROUNDS
    records = []
    for number, record in enumerate(records_of(RoundRecord, read_lines(path), path), start=1):
        if record.round != number:
            raise damaged(f"{path}, line {number}", f"round {number}", f"it is of round {record.round}")
        records.append(record)
    return records


def read_clients(directory: Path) -> list[ClientRecord]:
    """The records of a run's usable updates so far. Raises ResultsError as `read_rounds`."""
    return list(records_of(ClientRecord, read_lines(directory / CLIENTS), directory / CLIENTS))


def records_of(of: type[R], lines: Iterable[object], path: Path) -> Iterator[R]:
    """The records of a file's lines. Raises ResultsError for one that is none."""
    for number, line in enumerate(lines, start=1):
        try:
            yield of.from_json(line)
        except ValueError as error:
            raise damaged(f"{path}, line {number}", "a record", error) from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a .jsonl file; none if it is not there yet.

    A last line that is cut short is left out: a run may be writing it.

    Raises:
        ResultsError: another line is damaged.
    """
    lines = lines_of(path)
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json_object(line))
        except ValueError as error:
            if number < len(lines):
                raise damaged(f"{path}, line {number}", "a JSON object", error) from error
    return records


def read_summary(directory: Path) -> Summary:
    """The summary of the finished run in this folder.

    Raises:
        ResultsError: the file is damaged, or that of another run.
    """
    path, of = directory / SUMMARY, read_experiment(directory)
    try:
        summary = Summary.from_json(json_object(path.read_bytes()))
    except ValueError as error:
        raise damaged(str(path), "the summary of a run", error) from error
    if (summary.name, summary.rounds) != (of.name, of.rounds):
        expected, found = f"{of.rounds} rounds of {of.name!r}", f"it has {summary.rounds} of {summary.name!r:.80}"
        raise damaged(str(path), expected, found)
    return summary


def json_object(text: bytes) -> dict[str, Any]:
    """The object that a JSON text is. Raises ValueError if it is another thing, or none."""
    record = json.loads(text)
    if not isinstance(record, dict):
        raise ValueError(f"it is {type(record).__name__}")
    return record


def save_round(
    directory: Path, record: RoundRecord, clients: list[ClientRecord], checkpoint: Checkpoint, kept: State
) -> None:
    """Record a whole round, with the weights that are `kept` of it, if any.

    The lines go first: without its checkpoint a line is dropped and made again on resuming, as the kept weights are.
    """
    append_lines(directory / ROUNDS, [record.to_json()])
    append_lines(directory / CLIENTS, (client.to_json() for client in clients))
    if kept:
        save_snapshot(directory, record.round, kept)
    save_checkpoint(directory / CHECKPOINT, checkpoint)


def finish_run(directory: Path, state: State, full_model_bytes: int, **more: Any) -> Summary:
    """Write the final model and the summary with `more` in it, which marks the run as finished; returns the summary."""
    save_tensors(directory / MODEL, state, {EXPERIMENT_KEY: _settings(read_experiment(directory))})
    summary = dataclasses.replace(summarize(directory, full_model_bytes), **more)
    write_atomically(directory / SUMMARY, (json.dumps(summary.to_json(), indent=2, allow_nan=False) + "\n").encode())
    (directory / CHECKPOINT).unlink(missing_ok=True)
    return summary


def read_model(file: Path) -> tuple[Experiment, State]:
    """A run's final model and the experiment that made it, from the file's metadata.

    A file that was written before these were there has them beside it, in experiment.toml.

    Raises:
        ResultsError: the file is damaged, or has no experiment.
    """
    state, metadata = load_tensors(file, "a run's final model")
    if EXPERIMENT_KEY in metadata:
        try:
            return make_experiment(json_object(metadata[EXPERIMENT_KEY].encode())), state
        except ValueError as error:
            raise damaged(str(file), "a run's final model", error) from error
    if not (file.parent / EXPERIMENT).exists():
        raise ResultsError(
            f"{file} does not say what it was trained with, and no {EXPERIMENT} is beside it: expected the "
            f"model of a run of zerofl; put the run's {EXPERIMENT} there"
        )
    return read_experiment(file.parent), state


def _settings(experiment: Experiment) -> str:
    values = dataclasses.asdict(experiment)
    return json.dumps({key: value for key, value in values.items() if key not in WHERE})


def summarize(directory: Path, full_model_bytes: int) -> Summary:
    """The figures of a whole run, from its folder."""
    experiment, rounds, clients = read_experiment(directory), read_rounds(directory), read_clients(directory)
    last, uplink_bytes = rounds[-1], sum(client.uplink_bytes for client in clients)
    train_cpu_seconds, train_joules = (
        total([getattr(record, key) for record in rounds]) for key in ("train_cpu_seconds", "train_joules")
    )
    # Of all rounds by the watts that `energy` below names: a run that was resumed may have had others before.
    watts = experiment.watts_per_core if experiment.device == "cpu" else 0.0
    train_joules_estimate = energy.joules_estimate(train_cpu_seconds, watts)
    best = max((r for r in rounds if r.test_accuracy is not None), key=lambda r: r.test_accuracy or 0.0, default=None)
    return Summary(
        name=experiment.name,
        rounds=last.round,
        test_accuracy=last.test_accuracy,
        test_loss=last.test_loss,
        validation_accuracy=last.validation_accuracy,
        best_test_accuracy=best.test_accuracy if best else None,
        best_round=best.round if best else None,
        uplink_bytes=uplink_bytes,
        refused_bytes=total([record.refused_bytes for record in rounds]),
        downlink_bytes=sum(record.downlink_bytes for record in rounds),
        updates=len(clients),
        full_model_bytes=full_model_bytes,
        savings=savings(full_model_bytes, len(clients), uplink_bytes),
        failures=sum(len(record.failures) for record in rounds),
        seconds=sum(record.seconds for record in rounds),
        train_seconds=sum(record.train_seconds or 0.0 for record in rounds),
        train_cpu_seconds=train_cpu_seconds,
        train_joules=train_joules,
        train_joules_estimate=train_joules_estimate,
        energy=energy.described(
            train_joules,
            train_joules_estimate,
            experiment.watts_per_core,
            energy.why_not_of_run(experiment, train_cpu_seconds),
        ),
        threads=experiment.threads,
        kernels=dispatch.name(experiment.device, experiment.precision),
        **origin(),
    )
