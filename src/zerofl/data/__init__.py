"""Data sets, from local folders only. Nothing downloads but `zerofl.data.fetch`, when asked to."""

import dataclasses
from collections.abc import Callable
from functools import cache, lru_cache

from torch import Tensor

from zerofl.data.cifar10 import load_cifar10
from zerofl.data.dataset import Augmentation, Dataset, DatasetError, Split, checksum
from zerofl.data.femnist import load_femnist
from zerofl.data.mnist5k import load_mnist5k
from zerofl.data.partition import PARTITIONS
from zerofl.data.speech import load_speech_commands, load_speech_commands_by_speaker

__all__ = [
    "DATASETS", "PARTITIONS", "Augmentation", "Dataset", "DatasetError", "Split", "client_indices",
    "dataset_checksum", "dataset_on",
    "load_dataset",
]  # fmt: skip

DATASETS: dict[str, Callable[[str], Dataset]] = {
    "cifar10": load_cifar10,
    "femnist": load_femnist,
    "mnist5k": load_mnist5k,
    "speech_commands": load_speech_commands,
    "speech_commands_by_speaker": load_speech_commands_by_speaker,
}
"""The data sets by name: what reads one from a folder or archive."""


@cache
def load_dataset(name: str, root: str) -> Dataset:
    """A data set by name, read from the folder or archive `root`; once per process, as all clients share it.

    Raises:
        DatasetError: it is not there, or not what it should be; the message says where it looked and where to get it.
    """
    return DATASETS[name](root)


@lru_cache(maxsize=2)
def dataset_on(name: str, root: str, device: str) -> Dataset:
    """A data set by name with its samples on a device; once per process, so that batches need not travel."""
    dataset = load_dataset(name, root)
    return dataclasses.replace(dataset, train=dataset.train.to(device), test=dataset.test.to(device))


@cache
def dataset_checksum(name: str, root: str) -> str:
    """The `checksum` of a data set by name; once per process."""
    return checksum(load_dataset(name, root))


@lru_cache(maxsize=16)
def client_indices(dataset: str, root: str, partition: str, clients: int, alpha: float, seed: int) -> list[Tensor]:
    """Each client's training samples, int64 and rising, dealt by `partition`; once per process.

    Raises:
        ValueError: the data set cannot be dealt to so many clients in this way.
    """
    return PARTITIONS[partition](load_dataset(dataset, root), clients, alpha, seed)
