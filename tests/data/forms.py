"""Every form in which a data set is read, small."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from tests.conftest import cifar_batch, write_cifar_python
from tests.data import hub_data
from tests.data.test_data import binary
from tests.data.test_femnist import write_femnist
from tests.data.test_speech import write_wav
from zerofl.data import Dataset
from zerofl.data.cifar10 import CLASSES, load_cifar10
from zerofl.data.femnist import load_femnist
from zerofl.data.speech import load_speech_commands_by_speaker


class Form(NamedTuple):
    """A form of a data set: what writes it, what loads it, one of its files, and a name like those of its files."""

    write: Callable[[Path], object]
    load: Callable[[str], Dataset]
    file: str
    alike: str


def write_cifar_binary(root: Path) -> None:
    for seed, name in enumerate([*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]):
        root.mkdir(exist_ok=True)
        (root / name).write_bytes(binary(*cifar_batch(seed, 10)))


def write_cifar_images(root: Path) -> None:
    for seed, part in enumerate(("train", "test")):
        for image, label in zip(*cifar_batch(seed, 10), strict=True):
            path = root / part / CLASSES[label] / "0.png"
            path.parent.mkdir(parents=True)
            Image.fromarray(image.reshape(3, 32, 32).transpose(1, 2, 0)).save(path)


def write_speech(root: Path) -> None:
    """Three speakers, of whom the last two are in the test part by the rule of `load_speech_commands_by_speaker`."""
    write_wav(root / "_background_noise_" / "hum.wav", 16_000)
    for number, speaker in enumerate(("00000000", "00000001", "00000006")):
        write_wav(root / "yes" / f"{speaker}_nohash_0.wav", 12_000, seed=number)


def write_speech_parquet(root: Path) -> None:
    write_speech(root.with_name("folders"))
    hub_data.save(hub_data.speech_splits(root.with_name("folders")), root)


def write_cifar_parquet(root: Path) -> None:
    hub_data.save({"train": hub_data.cifar_split(range(1), 10), "test": hub_data.cifar_split(range(1, 2), 10)}, root)


FORMS = {
    "cifar10 python": Form(lambda root: write_cifar_python(root, 10), load_cifar10, "data_batch_3", "data_batch_6"),
    "cifar10 binary": Form(write_cifar_binary, load_cifar10, "data_batch_3.bin", "data_batch_6.bin"),
    "cifar10 images": Form(write_cifar_images, load_cifar10, "train/cat/0.png", "1.png"),
    "cifar10 parquet": Form(write_cifar_parquet, load_cifar10, "train.parquet", "train-1.parquet"),
    "femnist json": Form(write_femnist, load_femnist, "femnist/train/all_data_1.json", "all_data_2.json"),
    "femnist parquet": Form(
        lambda root: hub_data.save({"train": hub_data.femnist_split()}, root),
        load_femnist,
        "train.parquet",
        "train-1.parquet",
    ),
    "speech wav": Form(
        write_speech, load_speech_commands_by_speaker, "yes/00000000_nohash_0.wav", "00000000_nohash_1.wav"
    ),
    "speech parquet": Form(
        write_speech_parquet, load_speech_commands_by_speaker, "train.parquet", "train-1.parquet"
    ),
}  # fmt: skip

NOISE = np.random.default_rng(0).bytes(1000)
