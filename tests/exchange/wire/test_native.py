"""The native versions of what an update's bytes are made with, against those in Python."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.sparse.operands import _native
from zerofl.exchange.update import Update, active_entries, sparsified
from zerofl.exchange.wire import VALUES, decode, encode, entropy, native, schema_of
from zerofl.exchange.wire.values import merge_planes, split_planes
from zerofl.sparse import dispatch, kernels

pytestmark = pytest.mark.skipif(dispatch.UNAVAILABLE is not None, reason="no native kernels")

NUMELS = st.one_of(st.integers(2, 200), st.integers(2, 2**31 - 1))
BITMAPS = hnp.arrays(np.uint8, st.integers(0, 200))
WORDS = hnp.arrays(np.uint32, st.integers(0, 60)).filter(lambda words: not len(words) or words[-1])
# Every kind of float, and numbers that are often equal.
FLOATS = st.one_of(st.floats(width=32), st.sampled_from([0.0, -0.0, 1.0, -1.0, math.inf, math.nan]))
PAIRS = st.integers(0, 600).flatmap(lambda n: st.tuples(*[hnp.arrays(np.float32, n, elements=FLOATS)] * 2))


@given(NUMELS, st.floats(0, 1), BITMAPS)
def test_what_constriction_wrote_is_read(numel: int, density: float, bitmap: np.ndarray) -> None:
    count = min(max(1, round(density * numel)), numel - 1)
    payload = entropy.encode_bitmap(bitmap, count, numel)
    words = np.frombuffer(payload[4:], np.uint32)
    decoded, is_all = native.ans_decode(entropy.cumulative(count, numel), words, len(bitmap))
    assert is_all
    assert decoded.tolist() == bitmap.tolist()


@given(st.integers(2, 2000), st.floats(0, 1), WORDS)
def test_any_words_are_read_as_constriction_reads_them(numel: int, density: float, words: np.ndarray) -> None:
    count = min(max(1, round(density * numel)), numel - 1)
    bitmap, is_all = entropy.decode_natively(words, count, numel)
    expected, expected_all = entropy.decode_with_constriction(words, count, numel)
    assert (bitmap.tolist(), is_all) == (expected.tolist(), expected_all)


@given(PAIRS, st.one_of(FLOATS.map(abs)))
def test_active_entries(pair: tuple[np.ndarray, np.ndarray], threshold: float) -> None:
    x, by = map(torch.from_numpy, pair)
    for ranks in (by, x):
        bits, values = kernels.active_entries(x, ranks, threshold)
        expected_bits, expected_values = active_entries(x, ranks, threshold)
        assert bits.tolist() == expected_bits.tolist()
        assert values.numpy().tobytes() == expected_values.numpy().tobytes()


def test_active_entries_of_any_shape_and_order() -> None:
    x = torch.randn(3, 4, 5, 6, 7)[:, ::2].transpose(0, 3)
    assert torch.equal(sparsified(x).to_dense(), x)


@given(hnp.arrays(np.uint32, st.integers(0, 300)))
def test_planes(bits: np.ndarray) -> None:
    planes = native.split_planes(bits)
    assert planes.tolist() == split_planes(bits).tolist()
    assert native.merge_planes(planes).tolist() == merge_planes(planes).tolist() == bits.tolist()


@pytest.mark.parametrize("values", VALUES)
def test_payloads_are_the_same_without_the_kernels(values: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    state = {"w": torch.randn(50, 81, generator=generator), "b": torch.randn(9, generator=generator)}
    update = Update(True, state | {"w": sparsified(torch.where(state["w"].abs() < 1.2, 0.0, state["w"]))})
    schema = schema_of(state)

    def payload() -> bytes:
        return encode(update, schema, values=values, generator=np.random.default_rng(0))

    with_kernels = payload()
    decoded = encode(decode(with_kernels, schema), schema)
    monkeypatch.setattr(dispatch, "UNAVAILABLE", "no compiler")
    assert payload() == with_kernels
    assert encode(decode(with_kernels, schema), schema) == decoded


def cumulative() -> np.ndarray:
    return np.linspace(0, 2**24, 257).astype(np.uint32)


@pytest.mark.parametrize(("place", "value"), [(0, 1), (256, 2**24 - 1), (256, 2**24 + 1), (7, 0), (7, 2**32 - 1)])
def test_sums_that_are_no_probabilities_are_refused(place: int, value: int) -> None:
    sums = cumulative()
    sums[place] = value
    for spoilt in (sums, cumulative()[:-1]):
        with pytest.raises(ValueError, match=r"expected 257 sums from 0 to 2\^24"):
            _native.ans_decode(spoilt, np.ones(3, np.uint32), np.ones(3, np.uint8))


def test_memory_of_another_size_or_type_is_refused() -> None:
    x, bits, numbers = torch.ones(20), torch.zeros(3, dtype=torch.uint8), np.ones(5, np.uint32)
    behind_the_last = torch.tensor([0, 0, 1], dtype=torch.uint8)
    misfits: list[tuple[str, Callable[[], object]]] = [
        ("by does not have the shape", lambda: _native.active_bits(x, x[:19], 0.5, bits)),
        ("bits does not have the shape", lambda: _native.active_bits(x, x, 0.5, bits[:2])),
        ("bits does not have the shape", lambda: _native.take_bits(x, bits[:2], torch.ones(0))),
        ("values does not have an entry for each bit", lambda: _native.take_bits(x, bits, torch.ones(1))),
        ("there is a bit behind the last entry", lambda: _native.take_bits(x, behind_the_last, torch.ones(1))),
        ("planes does not have 4 bytes", lambda: _native.split_planes(numbers, np.ones(19, np.uint8))),
        ("planes does not have 4 bytes", lambda: _native.merge_planes(np.ones(21, np.uint8), numbers)),
    ]
    for message, call in misfits:
        with pytest.raises(ValueError, match=message):
            call()
    wrong: list[Callable[[], object]] = [
        lambda: _native.active_bits(x.double(), x, 0.5, bits),
        lambda: _native.active_bits(x.view(4, 5), x, 0.5, bits),
        lambda: _native.split_planes(numbers[::2], np.ones(12, np.uint8)),
        lambda: _native.merge_planes(np.ones(20, np.int8), numbers),
        lambda: _native.ans_decode(cumulative().astype(np.int64), np.ones(3, np.uint32), np.ones(3, np.uint8)),
        lambda: _native.ans_decode(cumulative(), np.ones(3, np.uint32), bytes(8)),
    ]
    for call in wrong:
        with pytest.raises(TypeError, match="incompatible function arguments"):
            call()
