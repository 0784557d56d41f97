"""The data sets of the hub in small: `datasets.Dataset` with the columns and features that the real ones have."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
from datasets import Audio, ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Pillow

from tests.conftest import cifar_batch
from zerofl.data import cifar10, femnist

WRITERS = {"f0002_14": 23, "f0001_41": 5, "f0003_14": 4, "f0000_00": 1}
"""Each writer's images."""


def cifar_split(seeds: range, count: int = 40) -> Dataset:
    """The images of `cifar_batch` for these seeds, in their order."""
    rows = [
        {"img": Pillow.fromarray(image.reshape(3, 32, 32).transpose(1, 2, 0)), "label": int(label)}
        for seed in seeds
        for image, label in zip(*cifar_batch(seed, count), strict=True)
    ]
    return Dataset.from_list(rows, Features({"img": Image(), "label": ClassLabel(names=list(cifar10.CLASSES))}))


def ink(writer: str, index: int) -> np.ndarray:
    """A writer's image uint8 [28, 28]."""
    return np.random.default_rng([int(writer[1:5]), index]).integers(0, 256, (28, 28)).astype(np.uint8)


def femnist_split() -> Dataset:
    """Writers' images in turn, as the rows of one writer need not be together; a label is the image's number."""
    rows = [
        {"image": Pillow.fromarray(ink(writer, i)), "writer_id": writer, "hsf_id": 0, "character": i}
        for i in range(max(WRITERS.values()))
        for writer, count in WRITERS.items()
        if i < count
    ]
    features = {
        "image": Image(), "writer_id": Value("string"), "hsf_id": Value("int64"),
        "character": ClassLabel(names=list(femnist.CLASSES)),
    }  # fmt: skip
    return Dataset.from_list(rows, Features(features))


def speech_splits(folder: Path) -> dict[str, Dataset]:
    """The clips of folders of words as the hub has them, in any split, and the noises in the first.

    The test split has silence of its own, and its unknown words are in one folder.
    """
    names = [*sorted(path.name for path in folder.iterdir() if not path.name.startswith("_")), "_silence_"]
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "validation": [], "test": []}
    for number, path in enumerate(sorted(folder.glob("*/*.wav"), reverse=True)):
        word, split = path.parent.name, list(rows)[number % 3]
        file = f"{word}/{path.name}"
        speaker, take = path.name.removesuffix(".wav").split("_nohash_") if "_nohash_" in path.name else (None, 0)
        if word.startswith("_"):
            split = "test" if word == "_silence_" else "train"
        elif split == "test" and word not in ("yes", "no"):
            file = f"_unknown_/{word}_{path.name}"
        rows[split].append({
            "file": file, "audio": {"bytes": path.read_bytes(), "path": path.name},
            "label": names.index(word if speaker else "_silence_"), "is_unknown": False, "speaker_id": speaker,
            "utterance_id": int(take),
        })  # fmt: skip
    features = {
        "file": Value("string"), "audio": {"bytes": Value("binary"), "path": Value("string")},
        "label": ClassLabel(names=names), "is_unknown": Value("bool"), "speaker_id": Value("string"),
        "utterance_id": Value("int8"),
    }  # fmt: skip
    # Made of bytes and cast: encoding a sound needs a package that fetching does not.
    return {
        split: Dataset.from_list(members, Features(features)).cast_column("audio", Audio(sampling_rate=16_000))
        for split, members in rows.items()
    }


def save(splits: dict[str, Dataset], folder: Path) -> Path:
    """Write `folder/<split>.parquet`."""
    folder.mkdir(parents=True)
    for split, rows in splits.items():
        rows.to_parquet(folder / f"{split}.parquet")
    return folder


def change(file: Path, row: int, edit: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Change one row of a parquet file; its metadata stay."""
    table = pyarrow.parquet.read_table(file)
    rows = table.to_pylist()
    rows[row] = edit(rows[row])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, table.schema), file)


def without_metadata(file: Path) -> None:
    """Take away the names of the classes."""
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(file).replace_schema_metadata(None), file)


def rename(file: Path, old: str, new: str) -> None:
    """Rename a column, or a class, also in the metadata."""
    table = pyarrow.parquet.read_table(file)
    names = [new if name == old else name for name in table.column_names]
    metadata = {key: re.sub(f'"{old}"', f'"{new}"', value.decode()) for key, value in table.schema.metadata.items()}
    pyarrow.parquet.write_table(table.rename_columns(names).replace_schema_metadata(metadata), file)
