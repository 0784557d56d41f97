from pathlib import Path

import pytest

from tests.running import experiment_of
from zerofl.data import load_dataset
from zerofl.fl.flops import training_flops


def test_resnet_18_by_hand(cifar_root: Path) -> None:
    """Width 64 on 32x32 images: the stem, 16 sparse 3x3 convolutions, three 1x1 shortcuts and the last layer."""
    dataset = load_dataset("cifar10", str(cifar_root))
    stem = 3 * 9 * 64 * 32**2
    # Channels in, channels out, and the side of the output, of each sparse convolution.
    shapes = [(64, 64, 32)] * 4
    for before, after, side in ((64, 128, 16), (128, 256, 8), (256, 512, 4)):
        shapes += [(before, after, side)] + [(after, after, side)] * 3
    sparse = sum(before * 9 * after * side**2 for before, after, side in shapes)
    shortcuts = 64 * 128 * 16**2 + 128 * 256 * 8**2 + 256 * 512 * 4**2
    others = 3 * (shortcuts + 512 * 10) + 2 * stem
    experiment = experiment_of(cifar_root, width=64, sparsity=0.95, activation_sparsity=0.9)
    flops = training_flops(experiment, dataset)
    assert flops.dense == 2 * (3 * sparse + others)
    assert flops.sparse == pytest.approx(2 * ((2 * 0.05 + 0.1) * sparse + others))


def test_without_sparsity_both_are_the_same(cifar_root: Path) -> None:
    experiment, dataset = experiment_of(cifar_root, sparsity=0.0), load_dataset("cifar10", str(cifar_root))
    flops = training_flops(experiment, dataset)
    assert flops.sparse == flops.dense
