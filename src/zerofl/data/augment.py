"""The usual CIFAR augmentation: a random crop of the image padded by 4, and a random mirror image."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

PADDING = 4


def crop_and_flip(images: Tensor, generator: np.random.Generator) -> Tensor:
    """Uint8 [N, C, H, W] -> the same shape: each image shifted by up to 4 pixels over black borders, half mirrored."""
    count, _, height, width = images.shape
    padded = F.pad(images, (PADDING,) * 4)
    tops, lefts = generator.integers(0, 2 * PADDING + 1, (2, count))
    mirrored = generator.random(count) < 0.5
    crops = [
        padded[i, :, top : top + height, left : left + width]
        for i, (top, left) in enumerate(zip(tops, lefts, strict=True))
    ]
    return torch.stack([crop.flip(-1) if flip else crop for crop, flip in zip(crops, mirrored, strict=True)])
