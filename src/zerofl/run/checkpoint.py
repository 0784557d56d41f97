"""Tensors in files with a checksum: checkpoints, kept weights and the final model of a run."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from zerofl.exchange.update import State
from zerofl.run.files import SNAPSHOTS, ResultsError, damaged, replacing


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


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint in place of the one before, atomically."""
    tensors = {f"state/{name}": tensor for name, tensor in checkpoint.state.items()}
    tensors |= {f"optimizer/{name}": tensor for name, tensor in checkpoint.optimizer_state.items()}
    metadata = {
        "round": str(checkpoint.round),
        "data_sha256": checkpoint.data_sha256,
        "sources_sha256": " ".join(checkpoint.sources_sha256),
    }
    save_tensors(path, tensors, metadata)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint; its tensors come in the file's order, not the model's.

    Raises:
        ResultsError: the file is damaged: it is none, or does not agree with the checksum in it.
    """
    expected = "a run's state after a round"
    tensors, metadata = load_tensors(path, expected)
    parts: dict[str, State] = {"state": {}, "optimizer": {}}
    try:
        for key, tensor in tensors.items():
            part, _, name = key.partition("/")
            parts[part][name] = tensor
        code = tuple(metadata.get("sources_sha256", UNKNOWN).split())
        return Checkpoint(int(metadata["round"]), parts["state"], parts["optimizer"], metadata["data_sha256"], code)
    except (KeyError, ValueError) as error:
        raise damaged(str(path), expected, error) from error


def save_snapshot(directory: Path, round: int, weights: State) -> None:
    """Keep some weights of a round, by layer."""
    (directory / SNAPSHOTS).mkdir(exist_ok=True)
    save_tensors(directory / SNAPSHOTS / f"round-{round:05d}.safetensors", weights)


def read_snapshots(directory: Path) -> dict[int, State]:
    """The kept weights of a run, by round.

    Raises:
        ResultsError: a file is damaged.
    """
    return {round_of(path): load_tensors(path, "the kept weights of a round")[0] for path in snapshot_files(directory)}


def snapshot_files(directory: Path) -> list[Path]:
    """The files of the kept weights, in the order of their rounds."""
    return sorted((directory / SNAPSHOTS).glob("round-*.safetensors"))


def round_of(snapshot: Path) -> int:
    """The round that a file of kept weights is of. Raises ResultsError if its name tells none."""
    number = snapshot.stem.removeprefix("round-")
    if not number.isdecimal():
        raise ResultsError(f"{snapshot}: expected a name such as round-00020.safetensors; take the file away")
    return int(number)


def save_tensors(path: Path, tensors: State, metadata: Mapping[str, str] = MappingProxyType({})) -> None:
    """`write_atomically` of a safetensors file with a checksum in it, without a copy of it in memory."""
    with replacing(path) as temporary:
        try:
            safetensors.torch.save_file(tensors, temporary, {**metadata, "sha256": _checksum(tensors, metadata)})
        except SafetensorError as error:  # which is how it reports a full disk
            number = re.search(r"\(os error (\d+)\)", str(error))
            if number is None:
                raise OSError(f"{path}: {error}") from error
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def load_tensors(path: Path, expected: str) -> tuple[State, dict[str, str]]:
    """What `save_tensors` wrote: tensors and metadata. Earlier versions wrote no checksum, nor anything with it.

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
        raise damaged(str(path), expected, error) from error
    return tensors, metadata


def _checksum(tensors: State, metadata: Mapping[str, str]) -> str:
    """SHA-256 over names, types, shapes and values, and over the metadata."""
    digest = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
