"""A run's files: their names, and writing them so that after a kill or a power cut each is as before, or whole."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zerofl.data.temporary import folder_beside
from zerofl.errors import ZeroFLError

EXPERIMENT = "experiment.toml"
ROUNDS = "rounds.jsonl"
CLIENTS = "clients.jsonl"
CHECKPOINT = "checkpoint.safetensors"
SNAPSHOTS = "snapshots"
MODEL = "model.safetensors"
SUMMARY = "summary.json"
LOCK = ".lock"
SWEEP = "sweep.toml"
"""In the folder above the runs: the file they are of."""

EXPERIMENT_KEY = "experiment"
"""In a model's metadata: the experiment as JSON, without the keys that say where it ran."""

FIX = "restore the file, or move the run's folder away and run it again"


class ResultsError(ZeroFLError):
    """A run's folder that cannot be started, resumed or read; the message says what to do."""


def damaged(where: str, expected: str, cause: object) -> ResultsError:
    """The error of a file that is not what it should be."""
    cause = " ".join(str(cause).split())
    return ResultsError(f"{where}: expected {expected}, but it is damaged: {cause}. {FIX.capitalize()}")


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that after a kill or a power cut it is either as it was before, or whole."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
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


def lines_of(path: Path) -> list[bytes]:
    """The lines of a file; none if it is not there yet."""
    return path.read_bytes().splitlines() if path.exists() else []


def append_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Add a line of JSON for each record, and see it to the disk."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(record, allow_nan=False) + "\n" for record in records)
        file.flush()
        os.fsync(file.fileno())
