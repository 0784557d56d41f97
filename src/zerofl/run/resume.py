"""If a run may start in its folder or be resumed there, and from which round on."""

import dataclasses
import fcntl
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import tomli_w
import torch

from zerofl.experiment import Experiment, differing_keys
from zerofl.fl.records import ClientRecord, RoundRecord
from zerofl.run.checkpoint import UNKNOWN, Checkpoint, load_checkpoint, round_of, snapshot_files
from zerofl.run.files import (
    CHECKPOINT,
    CLIENTS,
    EXPERIMENT,
    FIX,
    LOCK,
    ROUNDS,
    SNAPSHOTS,
    SUMMARY,
    ResultsError,
    damaged,
    lines_of,
    write_atomically,
)
from zerofl.run.folder import is_finished, json_object, read_experiment, read_summary, records_of
from zerofl.run.origin import code
from zerofl.run.room import fix_of


def check_run(directory: Path, experiment: Experiment, resume: bool) -> Experiment:
    """Raise unless `experiment` can run in this folder, before anything is written; returns it, its threads settled.

    A run that failed before its first round may be tried again, also with other settings.

    Raises:
        ResultsError: there is a run already and `resume` is not set, or it is a run of another experiment, or its
            settings are gone, or it is finished and its summary is damaged.
    """
    left = [file for file in (ROUNDS, CLIENTS, CHECKPOINT, SNAPSHOTS, SUMMARY) if (directory / file).exists()]
    if not left:  # at most the settings, of a run that failed before its first round
        return dataclasses.replace(experiment, threads=experiment.threads or torch.get_num_threads())
    if not (directory / EXPERIMENT).exists():
        raise ResultsError(
            f"{directory} has {' and '.join(left)} of a run, but not its {EXPERIMENT}: restore that, move the "
            "folder away, or write elsewhere with --out"
        )
    stored = read_experiment(directory)
    experiment = dataclasses.replace(experiment, threads=experiment.threads or stored.threads)
    if not resume:
        raise ResultsError(
            f"{directory} holds a run already: resume it with --resume, write elsewhere with --out, or remove it"
        )
    if differences := differing_keys(stored, experiment):
        raise ResultsError(
            f"{directory} holds a run with other settings, theirs and the new: {'; '.join(differences)}. "
            "Write elsewhere with --out, or give the same settings"
        )
    if is_finished(directory):
        read_summary(directory)  # raises if it is damaged
    return experiment


def open_run(
    directory: Path, experiment: Experiment, report: Callable[[str], None] = lambda line: None
) -> Checkpoint | None:
    """Start a run's folder, or take up the one that is there; returns where to resume, if it has come that far.

    `report` is given a line for what somebody should know who resumes a run: rounds that are run again, other code.

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
            f"{directory} has records up to round {recorded}, but its {CHECKPOINT}, from which to resume, is gone: "
            f"{FIX}"
        )
    kept = {file: _lines_until(directory / file, done) for file in (ROUNDS, CLIENTS)}
    _check_lines(directory, kept, done)
    for file, lines in kept.items():
        if (directory / file).exists():
            write_atomically(directory / file, b"".join(lines))
    for line in _notes(checkpoint, recorded):
        report(line)
    return checkpoint


def _last_recorded(directory: Path) -> int:
    """The last round of which there is a record or a snapshot; 0 without any."""
    rounds = [0, *(round_of(path) for path in snapshot_files(directory))]
    for file in (ROUNDS, CLIENTS):
        for line in lines_of(directory / file):
            with suppress(ValueError, KeyError):  # cut short, or damaged
                rounds.append(json_object(line)["round"])
    return max(round for round in rounds if type(round) is int)


def _notes(checkpoint: Checkpoint | None, recorded: int) -> Iterator[str]:
    """What somebody who resumes the run should know."""
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


def check_free(directory: Path) -> None:
    """Raise ResultsError if another process runs into this folder, which may have come no further than its settings."""
    if (directory / LOCK).exists():
        try:
            with locked(directory):
                pass
        except OSError as error:  # no locks on its disk, or another user's
            raise ResultsError(f"{directory}: {error}. {fix_of(error)}, or write elsewhere with --out") from error


def _check_lines(directory: Path, kept: Mapping[str, Sequence[bytes]], done: int) -> None:
    """Raise unless the rounds up to the checkpoint's have their lines, and those the updates they count."""
    lines = {file: map(json_object, of) for file, of in kept.items()}
    rounds = list(records_of(RoundRecord, lines[ROUNDS], directory / ROUNDS))
    if [record.round for record in rounds] != list(range(1, done + 1)):
        have = f"it has {len(rounds)}"
        raise damaged(str(directory / ROUNDS), f"a line for each of the rounds 1 to {done}", have)
    examples = Counter[int]()
    for client in records_of(ClientRecord, lines[CLIENTS], directory / CLIENTS):
        examples[client.round] += client.examples
    for record in rounds:
        if record.examples != examples[record.round]:
            expected = f"updates on {record.examples} samples in round {record.round}"
            have = f"it has updates on {examples[record.round]}"
            raise damaged(str(directory / CLIENTS), expected, have)


def _lines_until(path: Path, round: int) -> list[bytes]:
    """The lines up to a round's: later ones have no checkpoint, a half-written last line among them."""
    kept = []
    for line in lines_of(path):
        try:
            if json_object(line)["round"] <= round:
                kept.append(line + b"\n")
        except (ValueError, KeyError, TypeError):
            break
    return kept
