import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zerofl.exchange.overlap import MaskCounts
from zerofl.exchange.update import Update, sparsified


def update(mask: np.ndarray) -> Update:
    return Update(adds=False, tensors={"a": sparsified(torch.from_numpy(mask.astype(np.float32))), "b": torch.ones(3)})


@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=2, max_size=6))
def test_overlap_is_the_mean_shared_by_two_clients_over_the_mean_sent(masks: list[list[bool]]) -> None:
    counts = MaskCounts()
    for mask in masks:
        counts.add(update(np.array(mask)))
    shared = np.mean([np.sum(np.array(a) & np.array(b)) for a, b in itertools.combinations(masks, 2)])
    sent = np.mean([np.sum(mask) for mask in masks])
    expected = shared / sent if sent else 0.0
    assert counts.overlap() == {"a": pytest.approx(expected)}  # the dense tensor has no mask


def test_one_client_has_nobody_to_agree_with() -> None:
    counts = MaskCounts()
    assert counts.overlap() == {}
    counts.add(update(np.array([True])))
    assert counts.overlap() == {}


def test_more_clients_than_a_byte_counts() -> None:
    counts = MaskCounts()
    for _ in range(300):
        counts.add(update(np.array([True, False])))
    assert counts.overlap() == {"a": 1.0}
