"""What a local copy of a data set holds, and whether that is the complete published data."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from zerofl.data import cifar10, dataset_checksum, femnist, load_dataset, speech
from zerofl.data.dataset import Dataset, Split

Figures = Mapping[str, int | range]


@dataclass(frozen=True)
class Published:
    """The complete published data.

    `figures` are the counts of `figures_of` by which it is known, or the range that a count is in, for each version of
    it that was published, the paper's first. `checksum` is that of `zerofl.data.dataset.checksum`, and `content` that
    of `content_checksum`; "" where it is not known. `remedy` is how to get the complete data, where that needs a word.
    """

    figures: tuple[Figures, ...]
    checksum: str = ""
    content: str = ""
    remedy: str = ""


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


PUBLISHED = {
    "cifar10": Published(
        (
            {"training samples": 50_000, "test samples": 10_000}
            | {f"training samples of {name}": 5_000 for name in cifar10.CLASSES}
            | {f"test samples of {name}": 1_000 for name in cifar10.CLASSES},
        ),
        checksum="612671e6bb37e8b15ec4552378c264385574c06bf77b146df22c121b3b667b99",
        content="dd79df4c25482d0269908bfc9eeb7737a148e217e0e479f44ec0efb91fc152f1",
    ),
    # Of LEAF's scripts now, which give each writer but the first his first image twice; on the hub; in LEAF's paper.
    "femnist": Published(
        (
            _in_fifths(3_597, 817_851, more_trains=False),
            _in_fifths(3_597, 814_277, more_trains=True),
            _in_fifths(3_550, 805_263, more_trains=False),
        ),
        remedy=f"the complete data with the paper's parts, 80/20, are LEAF's by {femnist.LEAF_COMMAND}; without --tf "
        "LEAF splits 90/10",
    ),
    "mnist5k": Published(
        ({"training samples": 4_000, "test samples": 1_000},),
        checksum="9dd2b68a2c5441bac6d651c1009fb8ff62b01db3f249a9fd355e663d6d6cbaee",
    ),
    # v0.01. The parts are the authors'; silence is a tenth of the clips, rounded down.
    "speech_commands": Published(
        (
            {
                "training samples": 51_088 + 5_108,
                "training samples of silence": 5_108,
                "test samples": 6_835 + 683,
                "test samples of silence": 683,
            },
        )
    ),
    "speech_commands_by_speaker": Published(({"samples without silence": 64_721},)),
}

STRAY_FILES: dict[str, Callable[[str], list[Path]]] = {
    "speech_commands": speech.stray_files,
    "speech_commands_by_speaker": speech.stray_files,
}
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


def check_dataset(name: str, root: str) -> Report:
    """Load a data set and compare it with `PUBLISHED`.

    Raises:
        DatasetError: it cannot be read.
    """
    found = report(name, load_dataset(name, root), dataset_checksum(name, root), PUBLISHED[name])
    return dataclasses.replace(found, remarks=(*found.remarks, *_stray(name, root)))


def _stray(name: str, root: str) -> list[str]:
    """A remark on the files that were not read, where it can be told."""
    files = STRAY_FILES[name](root) if name in STRAY_FILES else []
    if not files:
        return []
    more = f" and {len(files) - FILES_NAMED} more" if len(files) > FILES_NAMED else ""
    return [f"not read, as they are no clips: {', '.join(map(str, files[:FILES_NAMED]))}{more}"]


def report(name: str, dataset: Dataset, checksum: str, published: Published) -> Report:
    """Compare a data set that has this checksum with what was published."""
    differences, remarks = _differences(figures_of(dataset), published.figures), []
    if differences and published.remedy:
        remarks.append(published.remedy)
    if not published.checksum:
        remarks.append("there is no published checksum to compare with: only the counts were")
    elif not differences and checksum != published.checksum:
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
    )


def figures_of(dataset: Dataset) -> dict[str, int]:
    """Every count of a data set, by name."""
    figures = {
        "samples": len(dataset.train.labels) + len(dataset.test.labels),
        "natural clients": len(dataset.clients),
    }
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
