"""Data sets, from local folders only. Nothing downloads but `zerofl.data.fetch`, when asked to."""

import dataclasses
from functools import cache, lru_cache

from torch import Tensor

from zerofl.data import cifar10, femnist, mnist5k, speech
from zerofl.data.dataset import Augmentation, Dataset, DatasetError, Split, checksum
from zerofl.data.partition import PARTITIONS
from zerofl.data.source import Hub, Source

__all__ = [
    "DATASETS", "PARTITIONS", "Augmentation", "Dataset", "DatasetError", "Split", "client_indices",
    "dataset_checksum", "dataset_on", "load_dataset",
]  # fmt: skip

DATASETS = {
    "cifar10": Source(
        cifar10.load_cifar10,
        channels=3,
        classes=len(cifar10.CLASSES),
        published=cifar10.PUBLISHED,
        hub=Hub("uoft-cs/cifar10", None, ("train", "test")),
    ),
    "femnist": Source(
        femnist.load_femnist,
        channels=1,
        classes=len(femnist.CLASSES),
        published=femnist.PUBLISHED,
        hub=Hub("flwrlabs/femnist", None, ("train",)),
    ),
    "mnist5k": Source(mnist5k.load_mnist5k, channels=1, classes=10, published=mnist5k.PUBLISHED),
    "speech_commands": Source(
        speech.load_speech_commands,
        channels=1,
        classes=len(speech.CLASSES),
        published=speech.PUBLISHED,
        hub=Hub("google/speech_commands", "v0.01", ("train", "validation", "test"), sounds=("audio",)),
        stray_files=speech.stray_files,
    ),
    "speech_commands_by_speaker": Source(
        speech.load_speech_commands_by_speaker,
        channels=1,
        classes=len(speech.CLASSES),
        published=speech.PUBLISHED_BY_SPEAKER,
        stray_files=speech.stray_files,
    ),
}
"""The data sets by name."""


@cache
def load_dataset(name: str, root: str) -> Dataset:
    """A data set by name, read from the folder or archive `root`; once per process, as all clients share it.

    Raises:
        DatasetError: it is not there, or not what it should be; the message says where it looked and where to get it.
    """
    return DATASETS[name].load(root)


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
