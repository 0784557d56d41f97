"""The native versions of what an update's bytes are made with, against those in Python."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.sparse.operands import _native
from zerofl.exchange.update import active_entries, add_entries, entries_at, sparsified
from zerofl.exchange.wire import entropy, native, received
from zerofl.exchange.wire.values import add, merge_planes, split_planes, subtract
from zerofl.sparse import dispatch, kernels

pytestmark = pytest.mark.skipif(dispatch.UNAVAILABLE is not None, reason="no native kernels")

NUMELS = st.one_of(st.integers(2, 200), st.integers(2, 2**31 - 1))
BITMAPS = hnp.arrays(np.uint8, st.integers(0, 200))
WORDS = hnp.arrays(np.uint32, st.integers(0, 60)).filter(lambda words: not len(words) or words[-1])
# Every kind of float, and numbers that are often equal.
FLOATS = st.one_of(st.floats(width=32), st.sampled_from([0.0, -0.0, 1.0, -1.0, math.inf, math.nan]))
PAIRS = st.integers(0, 600).flatmap(lambda n: st.tuples(*[hnp.arrays(np.float32, n, elements=FLOATS)] * 2))


def counts_and_numels(models: list[tuple[int, float]]) -> tuple[np.ndarray, np.ndarray]:
    """From numbers of entries and densities: neither none nor all are set."""
    counts = [min(max(1, round(density * numel)), numel - 1) for numel, density in models]
    return np.array(counts, np.int64), np.array([numel for numel, _ in models], np.int64)


@given(st.lists(st.tuples(st.integers(2, 900), st.floats(0, 1)), max_size=4), st.data())
def test_what_constriction_wrote_is_read(models: list[tuple[int, float]], data: st.DataObject) -> None:
    counts, numels = counts_and_numels(models)
    bitmaps = data.draw(hnp.arrays(np.uint8, int((-(-numels // 8)).sum())))
    words = np.frombuffer(entropy.encode_bitmaps(bitmaps, counts, numels)[4:], np.uint32)
    for decode in (entropy.decode_natively, entropy.decode_with_constriction):
        decoded, is_all = decode(words, counts, numels)
        assert is_all
        assert decoded.tolist() == bitmaps.tolist()


@given(NUMELS, st.floats(0, 1), BITMAPS)
def test_probabilities_are_constrictions(numel: int, density: float, bitmap: np.ndarray) -> None:
    counts, numels = counts_and_numels([(numel, density)])
    coder, (model,) = entropy.AnsCoder(), entropy._byte_models(counts, numels)
    coder.encode_reverse(bitmap.astype(np.int32), model)
    cumulative = entropy.cumulative(counts, numels)
    decoded, is_all = native.ans_decode(cumulative, coder.get_compressed(), np.array([len(bitmap)]))
    assert is_all
    assert decoded.tolist() == bitmap.tolist()


@given(st.lists(st.tuples(st.integers(2, 2000), st.floats(0, 1)), max_size=3), WORDS)
def test_any_words_are_read_as_constriction_reads_them(models: list[tuple[int, float]], words: np.ndarray) -> None:
    counts, numels = counts_and_numels(models)
    bitmaps, is_all = entropy.decode_natively(words, counts, numels)
    expected, expected_all = entropy.decode_with_constriction(words, counts, numels)
    assert (bitmaps.tolist(), is_all) == (expected.tolist(), expected_all)


@given(PAIRS, st.one_of(FLOATS.map(abs)))
def test_active_entries(pair: tuple[np.ndarray, np.ndarray], threshold: float) -> None:
    x, by = map(torch.from_numpy, pair)
    for ranks in (by, x):
        bits, values = kernels.active_entries(x, ranks, threshold)
        expected_bits, expected_values = active_entries(x, ranks, threshold)
        assert bits.tolist() == expected_bits.tolist()
        assert values.numpy().tobytes() == expected_values.numpy().tobytes()


@given(st.integers(0, 300), st.integers(0, 2**32 - 1), st.sampled_from([1.0, -0.3, 2.0**-40]))
def test_entries_taken_and_added(numel: int, seed: int, weight: float) -> None:
    """To the bit what PyTorch and numpy do, also where there are no kernels."""
    generator = np.random.default_rng(seed)
    x, y = (torch.from_numpy(generator.standard_normal(numel, np.float32)) for _ in range(2))
    sparse = sparsified(torch.where(torch.from_numpy(generator.random(numel) < 0.4), y, 0.0))
    expected = x.clone().index_add_(0, sparse.positions(), sparse.values, alpha=weight)
    for reason in (dispatch.UNAVAILABLE, "no compiler"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dispatch, "UNAVAILABLE", reason)
            total = x.clone()
            add_entries(total, sparse, weight)
            assert total.tolist() == expected.tolist()
            assert entries_at(x, sparse.bits).tolist() == x[sparse.positions()].tolist()


def test_active_entries_of_any_shape_and_order() -> None:
    x = torch.randn(3, 4, 5, 6, 7)[:, ::2].transpose(0, 3)
    assert torch.equal(sparsified(x).to_dense(), x)


@given(hnp.arrays(np.uint32, st.integers(0, 300)))
def test_planes(bits: np.ndarray) -> None:
    planes = native.split_planes(bits)
    assert planes.tolist() == split_planes(bits).tolist()
    assert native.merge_planes(planes).tolist() == merge_planes(planes).tolist() == bits.tolist()


@given(PAIRS)
def test_classes_of_magnitude(pair: tuple[np.ndarray, np.ndarray]) -> None:
    """NaN too: classes are of bits."""
    for numbers in pair:
        if len(numbers):
            largest = native.largest_magnitude(numbers)
            assert largest == (numbers.view(np.uint32) & 0x7FFFFFFF).max()
            expected = received.magnitude_classes(numbers, largest)
            assert native.magnitude_classes(numbers, largest).tolist() == expected.tolist()
            assert expected[(numbers.view(np.uint32) & 0x7FFFFFFF) == largest].tolist().count(23)


CLASSES = hnp.arrays(np.uint8, st.integers(0, 900), elements=st.integers(0, 23) | st.sampled_from([0, 23]))


@settings(deadline=None)
@given(CLASSES, st.integers(0, 2**32 - 1))
def test_dealing(classes: np.ndarray, seed: int) -> None:
    """To the bit what numpy deals, and back."""
    sizes = native.count_classes(classes)
    assert sizes.tolist() == np.bincount(classes, minlength=24).tolist()
    generator = np.random.default_rng(seed)
    bits = np.packbits(generator.random(len(classes)) < 0.4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "UNAVAILABLE", "no compiler")
        dealt = received.deal_bits(classes, sizes, bits)
        assert received.gather_bits(classes, sizes, dealt).tolist() == bits.tolist()
        assert native.deal_bits(classes, sizes, bits).tolist() == dealt.tolist()
        assert native.gather_bits(classes, sizes, dealt).tolist() == bits.tolist()
        for dtype in (np.uint8, np.uint16, np.uint32):
            numbers = generator.integers(0, np.iinfo(dtype).max, len(classes), dtype, endpoint=True)
            dealt = received.deal(classes, numbers)
            assert received.gather(classes, dealt).tolist() == numbers.tolist()
            assert native.deal(classes, numbers).tolist() == dealt.tolist()
            assert native.gather(classes, dealt).tolist() == numbers.tolist()


@given(st.integers(0, 70).flatmap(lambda n: st.tuples(*[hnp.arrays(np.uint32, n)] * 2)))
def test_differences(pair: tuple[np.ndarray, np.ndarray]) -> None:
    for dtype in (np.uint32, np.uint16):
        numbers, others = (bits.astype(dtype) for bits in pair)
        differences = subtract(numbers, others)
        assert add(others, differences).tolist() == numbers.tolist()
        assert native.subtract(numbers, others).tolist() == differences.tolist()
        assert native.add(others, differences).tolist() == numbers.tolist()


def cumulative() -> np.ndarray:
    return np.linspace(0, 2**24, 257).astype(np.uint32)


@pytest.mark.parametrize(("place", "value"), [(0, 1), (256, 2**24 - 1), (256, 2**24 + 1), (7, 0), (7, 2**32 - 1)])
def test_sums_that_are_no_probabilities_are_refused(place: int, value: int) -> None:
    sums = cumulative()
    sums[place] = value
    for spoilt in (sums, cumulative()[:-1]):
        with pytest.raises(ValueError, match=r"expected for each size 257 sums from 0 to 2\^24"):
            _native.ans_decode(spoilt, np.array([3]), np.ones(3, np.uint32), np.ones(3, np.uint8))
    for sizes in ([2], [4], [-1], [1, 2]):
        with pytest.raises(ValueError, match=r"expected for each size 257|the sizes are not those of the bytes"):
            _native.ans_decode(cumulative(), np.array(sizes), np.ones(3, np.uint32), np.ones(3, np.uint8))


def test_memory_of_another_size_or_type_is_refused() -> None:
    x, bits, numbers = torch.ones(20), torch.zeros(3, dtype=torch.uint8), np.ones(5, np.uint32)
    behind_the_last = torch.tensor([0, 0, 1], dtype=torch.uint8)
    misfits: list[tuple[str, Callable[[], object]]] = [
        ("by does not have the shape", lambda: _native.active_bits(x, x[:19], 0.5, bits)),
        ("bits does not have the shape", lambda: _native.active_bits(x, x, 0.5, bits[:2])),
        ("bits does not have the shape", lambda: _native.take_bits(x, bits[:2], torch.ones(0))),
        ("values does not have an entry for each bit", lambda: _native.take_bits(x, bits, torch.ones(1))),
        ("there is a bit behind the last entry", lambda: _native.take_bits(x, behind_the_last, torch.ones(1))),
        ("bits does not have the shape", lambda: _native.add_entries(x, bits[:2], torch.ones(0), 1.0)),
        ("values does not have an entry for each bit", lambda: _native.add_entries(x, bits, torch.ones(1), 1.0)),
        ("there is a bit behind the last entry", lambda: _native.add_entries(x, behind_the_last, torch.ones(1), 1.0)),
        ("planes does not have 4 bytes", lambda: _native.split_planes(numbers, np.ones(19, np.uint8))),
        ("planes does not have 4 bytes", lambda: _native.merge_planes(np.ones(21, np.uint8), numbers)),
    ]
    classes, sizes, dealt = np.array([0, 23, 0], np.uint8), np.zeros(24, np.int64), np.zeros(2, np.uint8)
    sizes[[0, 23]] = 2, 1
    one, three = np.zeros(1, np.uint8), np.zeros(3, np.uint8)
    others = np.roll(sizes, 1)
    misfits += [
        ("classes does not have one for each", lambda: _native.magnitude_classes(np.ones(3, np.float32), 2**31, one)),
        ("a larger number than largest", lambda: _native.magnitude_classes(np.ones(3, np.float32), 7, three)),
        ("sizes does not have 24 numbers", lambda: _native.count_classes(classes, sizes[:23].copy())),
        ("other numbers than 0 to 23", lambda: _native.count_classes(classes + 1, sizes)),
        ("other numbers than 0 to 23", lambda: _native.deal(classes + 1, three, three)),
        ("numbers does not have the size", lambda: _native.deal(classes, one, three)),
        ("dealt does not have the size", lambda: _native.gather(classes, one, three)),
        ("the sizes are not those of the bitmaps", lambda: _native.deal_bits(classes, sizes, one, three)),
        ("the sizes are not those of the bitmaps", lambda: _native.deal_bits(classes, sizes, dealt, dealt)),
        ("the sizes are not those of the bitmaps", lambda: _native.gather_bits(classes, -sizes, dealt, one)),
        ("the bitmaps are not those of the classes", lambda: _native.deal_bits(classes, others, one, dealt)),
        ("the bitmaps are not those of the classes", lambda: _native.deal_bits(classes + 100, sizes, one, dealt)),
        ("the bitmaps are not those of the classes", lambda: _native.gather_bits(classes + 100, sizes, dealt, one)),
        ("received does not have the size", lambda: _native.subtract(numbers, numbers[:4], numbers)),
        ("differences does not have the size", lambda: _native.add(numbers, numbers[:4], numbers.copy())),
    ]
    for message, call in misfits:
        with pytest.raises(ValueError, match=message):
            call()
    wrong: list[Callable[[], object]] = [
        lambda: _native.active_bits(x.double(), x, 0.5, bits),
        lambda: _native.active_bits(x.view(4, 5), x, 0.5, bits),
        lambda: _native.split_planes(numbers[::2], np.ones(12, np.uint8)),
        lambda: _native.merge_planes(np.ones(20, np.int8), numbers),
        lambda: _native.ans_decode(
            cumulative().astype(int), np.ones(1, int), np.ones(3, np.uint32), np.ones(1, np.uint8)
        ),
        lambda: _native.ans_decode(cumulative(), np.ones(1, int), np.ones(3, np.uint32), bytes(1)),
    ]
    for call in wrong:
        with pytest.raises(TypeError, match="incompatible function arguments"):
            call()
