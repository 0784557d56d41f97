"""The average over those who sent an entry, against sums written out."""

import pytest
import torch

from zerofl.exchange.aggregate import average
from zerofl.exchange.update import Update, sparsified

RECEIVED = {"w": torch.full((4,), 9.0), "b": torch.tensor([9.0]), "n": torch.tensor(0)}
SENT = [([4.0, 0.0, 1.0, 0.0], 2.0, 3, 10), ([8.0, 4.0, 0.0, 0.0], 6.0, 7, 30)]
"""Of two clients the weights of which those that are not zero are sent, a bias, a counter, and their samples."""


def averaged(adds: bool, overlap_normalization: float) -> list[list[float]]:
    updates = [
        (Update(adds, {"w": sparsified(torch.tensor(w)), "b": torch.tensor([b]), "n": torch.tensor(n)}), samples)
        for w, b, n, samples in SENT
    ]
    found = average(RECEIVED, updates, overlap_normalization=overlap_normalization)
    assert found["n"].dtype == torch.int64
    return [tensor.flatten().tolist() for tensor in found.values()]


@pytest.mark.parametrize(
    ("overlap_normalization", "by_hand"),
    [
        (0.0, [(10 * 4 + 30 * 8) / 40, 30 * 4 / 40, 10 * 1 / 40]),
        (1.0, [(10 * 4 + 30 * 8) / 40, 30 * 4 / 30, 10 * 1 / 10]),
        (0.5, [(10 * 4 + 30 * 8) / 40, 30 * 4 / 35, 10 * 1 / 25]),
    ],
)
@pytest.mark.parametrize("adds", [False, True])
def test_an_entry_is_divided_by_the_samples_of_its_senders(
    adds: bool, overlap_normalization: float, by_hand: list[float]
) -> None:
    before = 9.0 if adds else 0.0
    w, b, n = averaged(adds, overlap_normalization)
    assert w == pytest.approx([*(before + x for x in by_hand), before])  # the last one nobody sent
    assert b == [before + (10 * 2 + 30 * 6) / 40]  # everybody sends a dense layer
    assert n == [(10 * 3 + 30 * 7) / 40]


def test_what_all_send_is_averaged_to_the_same_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    received = {"w": torch.zeros(1000)}
    updates = [
        (Update(False, {"w": sparsified(torch.randn(1000, generator=generator) + 10)}), samples)
        for samples in (450, 449, 3)
    ]
    plain, normalized = (average(received, updates, overlap_normalization=share)["w"] for share in (0.0, 1.0))
    assert torch.equal(plain, normalized)
