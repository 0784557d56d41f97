"""What is known of a data set beside its samples: who reads it, what was published, and where it is fetched."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from zerofl.data.dataset import Dataset

Figures = Mapping[str, int | range]


@dataclass(frozen=True)
class Published:
    """The complete published data.

    `figures` are the counts of `figures_of` by which it is known, or the range that a count is in, for each version of
    it that was published, the paper's first; none of data that nobody published. `checksum` is that of
    `zerofl.data.dataset.checksum`, and `content` that of `content_checksum`; "" where it is not known. `remedy` is how
    to get the complete data, where that needs a word.
    """

    figures: tuple[Figures, ...]
    checksum: str = ""
    content: str = ""
    remedy: str = ""


class Hub(NamedTuple):
    """A data set on the hub: its repository, which subset of it, the splits, and the columns that hold sounds."""

    repository: str
    subset: str | None
    splits: tuple[str, ...]
    sounds: tuple[str, ...] = ()


class Source(NamedTuple):
    """A data set: `load` reads it from a folder or archive; its images have `channels`, and there are `classes`.

    `hub` is None where it is not fetched. `stray_files` finds the files in a folder that are none of its samples.
    """

    load: Callable[[str], Dataset]
    channels: int
    classes: int
    published: Published
    hub: Hub | None = None
    stray_files: Callable[[str], list[Path]] = lambda root: []
