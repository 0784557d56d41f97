"""What every data set looks like to the rest: images as bytes, labels, and how to normalise them."""

from dataclasses import dataclass

import torch
from torch import Tensor


class DatasetError(Exception):
    """A data set that is missing or malformed; the message says where it was looked for and what to do."""


@dataclass(frozen=True)
class Split:
    """Some samples: images uint8 [N, C, H, W] and labels int64 [N]."""

    images: Tensor
    labels: Tensor

    def take(self, indices: Tensor) -> "Split":
        """The samples at `indices`, int64 [n]."""
        return Split(self.images[indices], self.labels[indices])


@dataclass(frozen=True)
class Dataset:
    """Training and test samples, the number of classes, and each channel's mean and deviation on [0, 1]."""

    train: Split
    test: Split
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def normalized(self, images: Tensor) -> Tensor:
        """Uint8 [N, C, H, W] -> float32 of the same shape with zero mean and unit deviation on the training set."""
        mean, std = (torch.tensor(v, device=images.device).view(-1, 1, 1) for v in (self.mean, self.std))
        return (images.float() / 255 - mean) / std
