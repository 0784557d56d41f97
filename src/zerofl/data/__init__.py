"""Data sets, from local folders only. Nothing here downloads."""

from collections.abc import Callable
from functools import cache

from zerofl.data.cifar10 import load_cifar10
from zerofl.data.dataset import Dataset, DatasetError, Split
from zerofl.data.mnist5k import load_mnist5k

__all__ = ["DATASETS", "Dataset", "DatasetError", "Split", "load_dataset"]

DATASETS: dict[str, Callable[[str], Dataset]] = {"cifar10": load_cifar10, "mnist5k": load_mnist5k}


@cache
def load_dataset(name: str, root: str) -> Dataset:
    """A data set by name, read from the folder or archive `root`; once per process, as all clients share it.

    Raises:
        DatasetError: it is not there, or not what it should be; the message says where it looked and where to get it.
    """
    return DATASETS[name](root)
