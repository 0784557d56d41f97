"""Augmentation of each kind of picture, and what is none."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data.test_femnist import write_femnist
from zerofl.data import Dataset, Split, load_dataset
from zerofl.data.augment import crop_and_flip
from zerofl.data.cifar10 import CLASSES
from zerofl.data.femnist import load_femnist
from zerofl.data.mnist5k import load_mnist5k
from zerofl.experiment import Experiment, ExperimentError
from zerofl.fl.train import empty_model, train
from zerofl.run.preflight import check_fits


def stroke(background: int, ink: int) -> torch.Tensor:
    """400 times the same image [1, 28, 28]: an 8x8 block with a tip, far enough from the edge to stay in the image."""
    image = torch.full((1, 28, 28), background, dtype=torch.uint8)
    image[:, 10:18, 10:18] = ink
    image[:, 10, 18] = ink
    return image.expand(400, 1, 28, 28)


def test_augmenting_makes_no_ink_and_no_mirror_images_of_letters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """65 pixels of ink stay 65, and the tip stays at the right."""
    monkeypatch.setenv("ZEROFL_CACHE", str(tmp_path / "cache"))
    femnist, mnist5k = load_femnist(str(write_femnist(tmp_path))), load_mnist5k()
    for dataset, glyphs in ((femnist, stroke(background=255, ink=0)), (mnist5k, stroke(background=0, ink=255))):
        assert dataset.augmentation is not None
        out = crop_and_flip(glyphs, dataset.augmentation, np.random.default_rng(0))
        ink = dataset.normalized(out)[:, 0]
        assert ink.sum((1, 2)).tolist() == [65] * 400
        assert len({image.tobytes() for image in out.numpy()}) > 70  # of 81 places
        columns = [[n for n in image if n] for image in ink.sum(1).tolist()]
        assert columns == [[8] * 8 + [1]] * 400


def test_what_is_no_picture_is_not_augmented(cifar_root: Path) -> None:
    cifar = load_dataset("cifar10", str(cifar_root))
    spectrograms = Split(torch.zeros(4, 3, 32, 32), torch.zeros(4, dtype=torch.int64))
    speech = Dataset(spectrograms, spectrograms, CLASSES, mean=(0.0,), std=(1.0,), clients={})
    experiment = Experiment(root=str(cifar_root), augment=True, clients=4, clients_per_round=1)
    check_fits(experiment, cifar)
    with pytest.raises(ExperimentError, match=r"augment = true: cifar10 has no pictures .*; set augment = false"):
        check_fits(experiment, speech)
    with pytest.raises(ExperimentError, match="augment = true"):
        train(empty_model(experiment, speech), spectrograms, speech, experiment, round=1, client=0)
