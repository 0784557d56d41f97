import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zerofl.exchange.update import sparsified
from zerofl.sparse.topk import (
    active,
    count_top_k,
    keep_active,
    kth_by_torch_topk,
    top_k,
    top_k_threshold,
    top_k_threshold_by_sorting,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_threshold_is_exact_whatever_the_defaults_are(dtype: torch.dtype) -> None:
    x = torch.full((8, 5), 0.1, dtype=dtype)  # which bfloat16 rounds up
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            threshold = top_k_threshold(x, 20)
            sent = sparsified(x) if dtype == torch.float32 else None
    finally:
        torch.set_default_dtype(torch.float32)
    assert (threshold.dtype, threshold.device.type, threshold.item()) == (dtype, "cpu", x[0, 0].item())
    assert sent is None or sent.values.numel() == 40


@pytest.mark.parametrize(
    ("numel", "sparsity", "mask_ratio", "expected"),
    [
        (100, 0.95, 0.0, 5),  # (1 - 0.95) * 100 is 5.000000000000004 in floats, whose ceiling would be 6
        (10, 0.9, 0.0, 1),
        (10, 0.95, 0.0, 1),  # ceil(0.5)
        (100, 0.9, 0.2, 30),
        (100, 0.95, 0.95, 100),
        (100, 0.9, 1.0, 100),  # never more than there are
        (7, 0.0, 0.0, 7),
        (0, 0.9, 0.0, 0),
    ],
)
def test_count_is_the_ceiling_of_the_decimals_as_written(
    numel: int, sparsity: float, mask_ratio: float, expected: int
) -> None:
    assert count_top_k(numel, sparsity, mask_ratio) == expected


floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(st.lists(floats, min_size=1, max_size=50), st.data())
def test_threshold_equals_its_specification(values: list[float], data: st.DataObject) -> None:
    x = torch.tensor(values)
    k = data.draw(st.integers(0, len(values)))
    assert top_k_threshold(x, k) == top_k_threshold_by_sorting(x, k)


special = st.sampled_from([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@given(st.lists(floats | special, min_size=1, max_size=300), st.data())
def test_selection_by_torch_topk_is_selection_by_sorting(
    dtype: torch.dtype, values: list[float], data: st.DataObject
) -> None:
    x = torch.tensor(values).to(dtype)
    k = data.draw(st.integers(1, len(values)))
    expected = top_k_threshold_by_sorting(x, k)
    torch.testing.assert_close(kth_by_torch_topk(x, k), expected, rtol=0, atol=0, equal_nan=True)


def test_selection_by_torch_topk_of_a_layer() -> None:
    """With ties, and so many entries that another algorithm may be taken."""
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0)).round(decimals=3)
    for k in (1, 1000, 190_000, 200_000):
        assert kth_by_torch_topk(x, k) == top_k_threshold_by_sorting(x, k)


@pytest.mark.parametrize(
    ("values", "k", "expected"),
    [([3, 1, -2, 2], 2, 3), ([3, 1], 0, 0), ([3, 0, -1, -0.0], 3, 2), ([math.nan, 1, 2], 1, 3)],
)
def test_how_many_are_active(values: list[float], k: int, expected: int) -> None:
    """With ties more than k, zeros never, and all of them from a threshold on that is NaN."""
    assert top_k(torch.tensor(values, dtype=torch.float32), k)[1] == expected


@given(st.lists(floats, min_size=1, max_size=50, unique_by=abs), st.data())
def test_exactly_k_are_active_without_ties_and_none_is_smaller_than_an_inactive_one(
    values: list[float], data: st.DataObject
) -> None:
    x = torch.tensor(values)
    k = data.draw(st.integers(0, len(values)))
    is_active = active(x, top_k_threshold(x, k))
    assert is_active.sum() == k
    if 0 < k < len(values):
        assert x[is_active].abs().min() > x[~is_active].abs().max()


def test_ties_with_the_kth_are_all_active() -> None:
    x = torch.tensor([1.0, -2.0, 2.0, 0.5, 3.0])
    assert active(x, top_k_threshold(x, 2)).tolist() == [False, True, True, False, True]


def test_all_zero_and_all_equal_tensors() -> None:
    zeros, equal = torch.zeros(8), torch.full((8,), -3.0)
    assert keep_active(zeros, top_k_threshold(zeros, 2)).tolist() == [0.0] * 8
    assert keep_active(equal, top_k_threshold(equal, 2)).tolist() == [-3.0] * 8


def test_nan_and_infinity_stay_visible() -> None:
    x = torch.tensor([math.nan, 1.0, math.inf, 2.0])
    kept = keep_active(x, top_k_threshold(x, 2))
    assert math.isnan(kept[0])
    assert kept[1:].tolist() == [0.0, math.inf, 0.0]
    assert keep_active(torch.full((4,), math.nan), top_k_threshold(torch.full((4,), math.nan), 1)).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_keep_their_type_and_value(dtype: torch.dtype) -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    threshold = top_k_threshold(x, 50)
    assert threshold.dtype == dtype
    assert threshold == top_k_threshold_by_sorting(x, 50)


def test_a_non_contiguous_tensor_has_the_threshold_of_its_own_entries() -> None:
    x = torch.arange(24.0).view(4, 6)[:, ::2].T
    assert top_k_threshold(x, 3) == top_k_threshold_by_sorting(x.contiguous(), 3)
    of_five_dimensions = torch.arange(2880.0).view(2, 3, 4, 10, 12)[..., ::2].transpose(0, 3)
    assert top_k_threshold(of_five_dimensions, 3) == top_k_threshold_by_sorting(of_five_dimensions.contiguous(), 3)


@pytest.mark.parametrize("k", [-1, 5])
def test_k_out_of_range_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=r"k = -?\d is out of range for a tensor of 4 entries"):
        top_k_threshold(torch.ones(4), k)
