"""Figures that documents take from records."""

import re
from pathlib import Path

import pytest

from zerofl.run.folder import read_rounds

ROOT = Path(__file__).parents[2]


def overlaps(run: str, layer: str) -> str:
    """The least and the greatest of the means over the second half of a run's rounds, of a layer's convolutions."""
    records = read_rounds(ROOT / "results" / run)
    half = [record.mask_overlap or {} for record in records[len(records) // 2 :]]
    means = [sum(of[name] for of in half) / len(half) for name in half[0] if name.startswith(layer)]
    return f"{min(means):.2f} to {max(means):.2f}"


@pytest.mark.parametrize(
    ("run", "words"),
    [
        ("small-figure2/top-10-seed1", "{} (of what they send )?in layer 1 and {} in layer 4"),
        ("small-cifar10/top-k-diff-0.0-seed1", "from {} in layer 1 to {} in layer 4"),
        ("small-cifar10/top-k-diff-0.2-seed1", "from {} to {}"),
    ],
)
@pytest.mark.parametrize("page", ["docs/method.md", "results/README.md"])
def test_the_overlap_by_depth_is_that_of_every_strategy(run: str, words: str, page: str) -> None:
    text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
    assert re.search(words.format(overlaps(run, "layer1"), overlaps(run, "layer4")), text)
