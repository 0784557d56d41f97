"""What every data set looks like to the rest: samples, labels, classes, and which of them belong together."""

import hashlib
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from zerofl.errors import ZeroFLError


class DatasetError(ZeroFLError):
    """A data set that is missing or malformed; the message says where it was looked for and what to do."""


@dataclass(frozen=True)
class Split:
    """Some samples: images uint8 or float32 [N, C, H, W] and labels int64 [N]."""

    images: Tensor
    labels: Tensor

    def take(self, indices: Tensor) -> "Split":
        """The samples at `indices`, int64 [n]."""
        return Split(self.images[indices], self.labels[indices])

    def to(self, device: str) -> "Split":
        """The same samples on a device, without a copy if they are there."""
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Augmentation:
    """How images of bytes may be changed in training.

    A shifted image shows the byte `background` where it ends, and with `mirrored` half of them are mirrored left to
    right, which is for data that mean the same in a mirror.
    """

    background: int
    mirrored: bool


@dataclass(frozen=True)
class Dataset:
    """Training and test samples, the classes by label, and each channel's mean and deviation.

    Bytes count as [0, 1]. `clients` are the training samples of each natural client (a writer, a speaker) by its name,
    int64 and rising; a data set without such has none. Data that are no pictures have no `augmentation`.
    """

    train: Split
    test: Split
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    clients: dict[str, Tensor]
    augmentation: Augmentation | None = None

    def normalized(self, images: Tensor) -> Tensor:
        """[N, C, H, W] -> float32 of the same shape with zero mean and unit deviation on the training set."""
        mean, std = (_by_channel(values, images.device) for values in (self.mean, self.std))
        pixels = images.float() / 255 if images.dtype == torch.uint8 else images
        return (pixels - mean) / std


@cache
def _by_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Values [C, 1, 1] on a device; once, as a copy to a GPU waits for all else, and kept, as a CUDA graph reads it."""
    return torch.tensor(values, device=device).view(-1, 1, 1)


def checksum(dataset: Dataset) -> str:
    """SHA-256 over all samples, labels and natural clients in their order, in hexadecimal.

    Two copies with the same checksum train bit for bit alike.
    """
    digest = hashlib.sha256()
    for tensor in (dataset.train.images, dataset.train.labels, dataset.test.images, dataset.test.labels):
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    for name, indices in dataset.clients.items():
        digest.update(f"{name} {len(indices)}\n".encode())
        digest.update(indices.numpy().tobytes())
    return digest.hexdigest()
