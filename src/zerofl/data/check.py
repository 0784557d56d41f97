"""What a local copy of a data set holds, and whether that is the complete published data."""

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zerofl.data import DATASETS, dataset_checksum, load_dataset
from zerofl.data.dataset import Dataset, Split
from zerofl.data.source import Figures, Published
from zerofl.errors import some

FILES_NAMED = 5  # of the stray ones


@dataclass(frozen=True)
class Report:
    """What a copy of the data set `name` holds: counts [classes] of both parts, and the number of natural clients.

    `differences` are what the complete published data has otherwise; without any this is it. `remarks` are what else
    there is to know.
    """

    name: str
    classes: tuple[str, ...]
    train: tuple[int, ...]
    test: tuple[int, ...]
    natural_clients: int
    checksum: str
    differences: tuple[str, ...]
    remarks: tuple[str, ...]
    is_published: bool = True

    @property
    def verdict(self) -> str:
        """In a few words."""
        if not self.is_published:
            return "usable; nothing was published to compare it with"
        return "usable, but not the complete published data" if self.differences else "complete, as published"


def check_dataset(name: str, root: str) -> Report:
    """Load a data set and compare it with what was published.

    Raises:
        DatasetError: it cannot be read.
    """
    found = report(name, load_dataset(name, root), dataset_checksum(name, root), DATASETS[name].published)
    return dataclasses.replace(found, remarks=(*found.remarks, *_stray(name, root)))


def _stray(name: str, root: str) -> list[str]:
    """A remark on the files that were not read, where they are known."""
    files = DATASETS[name].stray_files(root)
    if not files:
        return []
    return [f"not read, as they are no clips: {some(files, FILES_NAMED)}"]


def report(name: str, dataset: Dataset, checksum: str, published: Published) -> Report:
    """Compare a data set that has this checksum with what was published."""
    differences, remarks = _differences(figures_of(dataset), published.figures) if published.figures else [], []
    if differences and published.remedy:
        remarks.append(published.remedy)
    if published.figures and not published.checksum:
        remarks.append("there is no published checksum to compare with: only the counts were")
    elif published.checksum and not differences and checksum != published.checksum:
        if published.content and content_checksum(dataset) == published.content:
            remarks.append(
                "every sample and its label are as published, but in another order than the original files have; "
                "a run's results differ from those on the original files as with another seed"
            )
        else:
            differences.append(
                f"checksum {checksum}, published {published.checksum}: the counts fit, but samples or labels differ, "
                "as after a lossy compression or from another version"
            )
    return Report(
        name,
        dataset.classes,
        train=tuple(_counts(dataset.train.labels, dataset).tolist()),
        test=tuple(_counts(dataset.test.labels, dataset).tolist()),
        natural_clients=len(dataset.clients),
        checksum=checksum,
        differences=tuple(differences),
        remarks=tuple(remarks),
        is_published=bool(published.figures),
    )


def figures_of(dataset: Dataset) -> dict[str, int]:
    """Every count of a data set, by name."""
    figures = {"samples": len(dataset.train.labels) + len(dataset.test.labels), "natural clients": len(dataset.clients)}
    for part, split in (("training", dataset.train), ("test", dataset.test)):
        counts = _counts(split.labels, dataset).tolist()
        figures[f"{part} samples"] = len(split.labels)
        figures |= {f"{part} samples of {name}": n for name, n in zip(dataset.classes, counts, strict=True)}
    silence = sum(figures.get(f"{part} samples of silence", 0) for part in ("training", "test"))
    return figures | {"samples without silence": figures["samples"] - silence}


def content_checksum(dataset: Dataset) -> str:
    """SHA-256 over the samples and labels of each part in any order, in hexadecimal: of each sample, and of these."""
    digest = hashlib.sha256()
    for split in (dataset.train, dataset.test):
        digest.update(f"{split.images.dtype} {tuple(split.images.shape)}\n".encode())
        digest.update(b"".join(sorted(_sample_digests(split))))
    return digest.hexdigest()


def class_table(dataset: Dataset, parts: Sequence[Tensor]) -> Tensor:
    """How many training samples of each class each client has, int64 [clients, classes], for their sample indices."""
    return torch.stack([_counts(dataset.train.labels[part], dataset) for part in parts])


def _sample_digests(split: Split) -> list[bytes]:
    return [
        hashlib.sha256(image.tobytes() + label.tobytes()).digest()
        for image, label in zip(split.images.contiguous().numpy(), split.labels.numpy(), strict=True)
    ]


def _differences(found: dict[str, int], versions: Sequence[Figures]) -> list[str]:
    """What is otherwise than in the version that it is nearest to; nothing if it is as in one of them."""
    otherwise = [
        [name for name, expected in figures.items() if not _fits(found.get(name, 0), expected)] for figures in versions
    ]
    names, nearest = min(zip(otherwise, versions, strict=True), key=lambda pair: len(pair[0]))
    return [f"{found.get(name, 0):,} {name}, published {_published(found, name, nearest, versions)}" for name in names]


def _published(found: dict[str, int], name: str, nearest: Figures, versions: Sequence[Figures]) -> str:
    """A count in all versions; in the nearest one alone where another, which differs elsewhere, has what was found."""
    expected = [figures[name] for figures in versions]
    if any(_fits(found.get(name, 0), of_version) for of_version in expected):
        expected = [nearest[name]]
    return " or ".join(dict.fromkeys(map(_text, expected)))


def _fits(count: int, expected: int | range) -> bool:
    return count in expected if isinstance(expected, range) else count == expected


def _text(expected: int | range) -> str:
    return f"{expected[0]:,} to {expected[-1]:,}" if isinstance(expected, range) else f"{expected:,}"


def _counts(labels: Tensor, dataset: Dataset) -> Tensor:
    return labels.bincount(minlength=len(dataset.classes))
