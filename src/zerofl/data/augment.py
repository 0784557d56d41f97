"""The usual CIFAR augmentation: a random crop of the image padded by 4, and for some data a random mirror image."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from zerofl.data.dataset import Augmentation

PADDING = 4


def crop_and_flip(images: Tensor, augmentation: Augmentation, generator: np.random.Generator) -> Tensor:
    """Bytes [N, C, H, W] -> the same shape: each image shifted by up to 4 pixels over the background.

    Where mirror images make sense half of them are mirrored left to right.
    """
    return shifted(images, augmentation, draw_places(images.shape, augmentation, generator))


def draw_places(shape: Sequence[int], augmentation: Augmentation, generator: np.random.Generator) -> Tensor:
    """Where in its padded image each pixel of a batch [N, C, H, W] comes from: int64 [N, 1, H * W]."""
    count, _, height, width = shape
    tops, lefts = generator.integers(0, 2 * PADDING + 1, (2, count))
    mirrored = generator.random(count) < (0.5 if augmentation.mirrored else 0.0)
    rows = tops[:, None, None] + np.arange(height)[:, None]
    columns = np.where(mirrored[:, None], np.arange(width)[::-1], np.arange(width)) + lefts[:, None]
    return torch.from_numpy((rows * (width + 2 * PADDING) + columns[:, None, :]).reshape(count, 1, -1))


def shifted(images: Tensor, augmentation: Augmentation, places: Tensor) -> Tensor:
    """Bytes [N, C, H, W], padded with the background, at the `places` of `draw_places`: the same shape."""
    if images.is_cuda:  # a copy that does not wait for what the device is still computing
        places = places.pin_memory().to(images.device, non_blocking=True)
    padded = F.pad(images, (PADDING,) * 4, value=augmentation.background).flatten(2)
    return padded.gather(2, places.expand(-1, padded.shape[1], -1)).view(images.shape)
