"""The native kernels' convolution, linear layer and threshold against `zerofl.sparse.swat` in float64."""

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.sparse.operands import (
    ISAS,
    Geometry,
    Operands,
    Results,
    _native,
    assert_same,
    between_nans,
    draw_operands,
    fresh,
    instruction_set,
    normal,
    reference,
    train,
)
from zerofl.sparse.topk import count_top_k, top_k_threshold_by_sorting

SPARSITIES = [0.0, 0.3, 0.7, 0.9, 0.95, 0.99]
seeds = st.integers(0, 2**32)
threads = st.integers(1, 4)


def examples(count: int) -> settings:
    return settings(max_examples=count, deadline=None, derandomize=True, database=None)


@st.composite
def geometries(draw: st.DrawFn, work: int = 2_000_000) -> Geometry:
    """Convolutions of up to `work` multiplications, mostly with sizes that are no multiple of a vector."""
    kernel, stride, padding, dilation, size = [], [], [], [], []
    for _ in range(2):
        kernel.append(draw(st.sampled_from([1, 2, 3, 3, 4, 5, 7])))
        stride.append(draw(st.integers(1, 3)))
        dilation.append(draw(st.sampled_from([1, 1, 2, 3])))
        padding.append(draw(st.integers(0, 4)))
        smallest = max(1, dilation[-1] * (kernel[-1] - 1) + 1 - 2 * padding[-1])
        size.append(draw(st.integers(smallest, smallest + 9)))
    channels = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 11, 15, 16, 17, 24, 33, 40])
    pairs = [(pair[0], pair[1]) for pair in (size, kernel, stride, padding, dilation)]
    one = Geometry(1, draw(channels), draw(channels), *pairs)
    per_image = torch.Size(one.weight).numel() * math.prod(one.out_size)
    return one._replace(batch=draw(st.integers(1, max(1, min(70, work // per_image)))))


@st.composite
def linears(draw: st.DrawFn) -> Geometry:
    sizes = st.one_of(st.integers(1, 40), st.integers(1, 300))
    return Geometry(draw(st.integers(1, 70)), draw(sizes), draw(sizes), size=(1, 1), kernel=(1, 1))


def count_of(x: Tensor, data: st.DataObject) -> int:
    """How many entries to keep, down to none."""
    return data.draw(st.sampled_from([count_top_k(x.numel(), s) for s in SPARSITIES] + [0, 1]))


def choice_of(x: Tensor, data: st.DataObject) -> tuple[Any, float]:
    """Some way to choose the active entries of x, and the threshold that it has to come to."""
    if data.draw(st.integers(0, 3)) == 0:
        threshold = data.draw(st.sampled_from([0.0, 1.0, 2.5, 7.0, 9.0, math.inf]))
        return _native.AtLeast(threshold, count_of(x, data)), threshold
    k = count_of(x, data)
    threshold = top_k_threshold_by_sorting(x, k).item()
    near = threshold * data.draw(st.sampled_from([1.0, 0.98, 1.02, 0.92, 1.08, 0.5, 2.0]))
    guess = data.draw(st.sampled_from([0.0, near, 0.5, 4.0, 1e-45, 3e38, math.inf, math.nan, -1.0]))
    return _native.TopK(k, guess), threshold


def check_integers(geometry: Geometry, data: st.DataObject) -> None:
    operands = draw_operands(geometry, data.draw(seeds), bias=data.draw(st.booleans()), addend=data.draw(st.booleans()))
    weight_choice, weight_threshold = choice_of(operands.weight, data)
    input_choice, input_threshold = choice_of(operands.input, data)
    expected = reference(operands, weight_threshold, input_threshold)
    count = data.draw(threads)
    for isa in ISAS:
        with instruction_set(isa):
            actual, *thresholds = train(operands, weight_choice, input_choice, count)
        assert thresholds == [weight_threshold, input_threshold]
        assert_same(actual, expected)


@given(geometries(), st.data())
@examples(150)
def test_a_convolution_of_integers_is_the_references_bit_by_bit(geometry: Geometry, data: st.DataObject) -> None:
    check_integers(geometry, data)


@given(linears(), st.data())
@examples(60)
def test_a_linear_layer_of_integers_is_the_references_bit_by_bit(geometry: Geometry, data: st.DataObject) -> None:
    check_integers(geometry, data)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("geometry", "sparsity"),
    [
        # Results from 2^19 floats on are written past the caches: output and grad_input; in phases; grad_weight.
        (Geometry(64, 32, 32, (16, 16), padding=(1, 1)), 0.9),
        (Geometry(32, 33, 16, (23, 23), stride=(2, 2), padding=(1, 1)), 0.9),
        (Geometry(33, 16, 33, (22, 22), (2, 2)), 0.9),
        (Geometry(3, 301, 200, (2, 3), padding=(1, 1)), 0.95),
        (Geometry(2, 700, 801, (1, 1), (1, 1)), 0.9),
        (Geometry(17, 768, 1024, (1, 1), (1, 1)), 0.0),
        (Geometry(1024, 40, 520, (1, 1), (1, 1)), 0.5),
        # Many input channels in several blocks, whose sums wait in memory; so many output channels that few can.
        (Geometry(64, 60, 9, (9, 10), (5, 5), padding=(2, 2)), 0.2),
        (Geometry(65, 60, 9, (9, 5), (5, 3), stride=(2, 1), padding=(2, 1)), 0.2),
        (Geometry(1, 100, 2100, (3, 3), (5, 5), padding=(2, 2)), 0.8),
        # Rows of several strips, and more rows than a sweep takes.
        (Geometry(48, 3, 5, (19, 25), padding=(1, 1)), 0.5),
        (Geometry(1, 2, 3, (40, 700), (3, 7), padding=(1, 3)), 0.3),
        # A linear layer whose weights are several parts, on whole and on partial vectors of images.
        (Geometry(20, 3000, 400, (1, 1), (1, 1)), 0.95),
        (Geometry(64, 700, 801, (1, 1), (1, 1)), 0.0),
        # Each span of input channels is more than a thread packs at a time.
        (Geometry(40, 3, 2, (30, 31), (1, 1)), 0.9),
    ],
    ids=str,
)
def test_large_tensors(geometry: Geometry, sparsity: float, isa: str) -> None:
    operands = draw_operands(geometry, seed=0, addend=not geometry.is_linear)
    weight_choice, weight_threshold = fresh(operands.weight, count_top_k(operands.weight.numel(), sparsity))
    input_choice, input_threshold = fresh(operands.input, count_top_k(operands.input.numel(), sparsity))
    with instruction_set(isa):
        actual, *thresholds = train(operands, weight_choice, input_choice, threads=3)
    assert thresholds == [weight_threshold, input_threshold]
    assert_same(actual, reference(operands, weight_threshold, input_threshold))


@given(st.one_of(geometries(), linears()), st.data())
@examples(60)
def test_real_numbers_differ_by_the_rounding_of_their_sums(geometry: Geometry, data: st.DataObject) -> None:
    operands = draw_operands(geometry, data.draw(seeds), normal, addend=data.draw(st.booleans()))
    (weight_choice, weight_threshold), (input_choice, input_threshold) = (
        fresh(x, count_of(x, data)) for x in (operands.weight, operands.input)
    )
    expected = reference(operands, weight_threshold, input_threshold)
    # A sum of n products a * b in any order is off by at most n * eps * sum |a * b| (Higham 2002, Eq. 3.5); the sums
    # are the reference's own of the magnitudes.
    size = reference(magnitudes(operands), weight_threshold, input_threshold)
    area, out_area = math.prod(geometry.kernel), math.prod(geometry.out_size)
    terms = [geometry.in_channels * area + 1, geometry.out_channels * area + 1, geometry.batch * out_area]
    for isa in ISAS:
        with instruction_set(isa):
            actual, *thresholds = train(operands, weight_choice, input_choice, data.draw(threads))
        assert thresholds == [weight_threshold, input_threshold]
        for ours, theirs, sums, n in zip(actual, expected, size, terms, strict=True):
            scale = sums.clamp(min=torch.finfo(torch.float32).tiny)
            atol = n * torch.finfo(torch.float32).eps
            torch.testing.assert_close(ours / scale, theirs / scale, rtol=0, atol=atol)


def magnitudes(operands: Operands) -> Operands:
    return Operands(operands.geometry, *(None if t is None else t.abs() for t in operands[1:]))  # type: ignore[arg-type]


@given(st.one_of(geometries(work=500_000), linears()), seeds)
@examples(45)
def test_results_do_not_depend_on_the_number_of_threads_or_the_guess(geometry: Geometry, seed: int) -> None:
    operands = draw_operands(geometry, seed, normal, addend=not geometry.is_linear)
    weights, inputs = (count_top_k(x.numel(), 0.8) for x in (operands.weight, operands.input))
    for isa in ISAS:
        with instruction_set(isa):
            first, weight_threshold, input_threshold = train(operands, _native.TopK(weights), _native.TopK(inputs), 1)
            for count in (2, 3, 4):
                for guess in (1.01, 0.5):
                    near = guess * weight_threshold, guess * input_threshold
                    choices = _native.TopK(weights, near[0]), _native.TopK(inputs, near[1])
                    assert_equal(train(operands, *choices, count)[0], first)


def assert_equal(actual: Results, expected: Results) -> None:
    """The same bits, of ordinary numbers."""
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@given(st.one_of(geometries(work=500_000), linears()), seeds, st.data())
@examples(90)
def test_nan_and_infinity_come_through_and_stay_where_they_belong(
    geometry: Geometry, seed: int, data: st.DataObject
) -> None:
    operands = draw_operands(geometry, seed)
    for tensor in (operands.input, operands.weight, operands.grad_output):
        for _ in range(data.draw(st.integers(0, 2))):
            tensor.view(-1)[data.draw(st.integers(0, tensor.numel() - 1))] = data.draw(
                st.sampled_from([math.nan, math.inf, -math.inf])
            )
    (weight_choice, weight_threshold), (input_choice, input_threshold) = (
        fresh(x, data.draw(st.integers(1, x.numel()))) for x in (operands.weight, operands.input)
    )
    expected = reference(operands, weight_threshold, input_threshold)
    # The kernels multiply with the zeros about an output gradient too, and zero times NaN is NaN: in the gradients it
    # reaches the whole of an input channel.
    expected.grad_weight[:, ~operands.input.isfinite().all(3).all(2).all(1)] = math.nan
    expected.grad_input[~operands.weight.isfinite().all(3).all(2).all(0)] = math.nan
    # Above zero where an active weight meets an input or output gradient that is not finite, or those two meet.
    active = (operands.weight != 0) & ~(operands.weight.abs() < weight_threshold)
    not_finite = [(~t.isfinite()).float() for t in (operands.input, operands.grad_output)]
    reached = reference(Operands(geometry, not_finite[0], active.float(), None, not_finite[1], None), 0.0, 0.0)
    for isa in ISAS:
        with instruction_set(isa):
            actual, *thresholds = train(operands, weight_choice, input_choice, data.draw(threads))
        expected_thresholds = [weight_threshold, input_threshold]
        torch.testing.assert_close(thresholds, expected_thresholds, rtol=0, atol=0, equal_nan=True)
        for ours, theirs, count in zip(actual, expected, reached, strict=True):
            finite = theirs.isfinite()
            torch.testing.assert_close(ours[finite], theirs[finite].float(), rtol=0, atol=0)
            assert not ours[count > 0].isfinite().any()


KINDS = ["normal", "ties", "equal", "zero", "nan", "infinite", "denormal", "wide", "ascending", "runs", "one"]


def tensor_of(kind: str, count: int, generator: torch.Generator) -> Tensor:
    x = torch.randn(count, generator=generator)
    chosen = torch.rand(count, generator=generator) < torch.rand(1, generator=generator)
    signs = x.sign()
    return {
        "normal": lambda: x,
        "ties": lambda: x.mul(2).round(),
        "equal": lambda: signs * 0.3,
        "zero": lambda: signs * 0.0,
        "nan": lambda: x.masked_fill(chosen, math.nan),
        "infinite": lambda: torch.where(chosen, signs * math.inf, x.masked_fill(x > 1, math.nan)),
        "denormal": lambda: x * 1e-41,
        "wide": lambda: x.sign() * torch.exp2(torch.rand(count, generator=generator) * 260 - 135),
        "ascending": lambda: x.abs().sort().values,
        # Runs of 8 large entries, one period of which is that of the sample by which the kernel guesses.
        "runs": lambda: x + 100 * (torch.arange(count) % torch.randint(9, 80, (1,), generator=generator) < 8),
        "one": lambda: x.masked_fill(torch.arange(count) < count - 1, 0.0),
    }[kind]()


@given(
    st.sampled_from(KINDS),
    st.one_of(st.integers(1, 200), st.integers(4000, 9000), st.integers(10_000, 200_000)),
    seeds,
    st.sampled_from([0.0, 1e-4, 0.05, 0.5, 0.95, 1.0]),
    threads,
)
@examples(200)
def test_the_threshold_is_that_of_sorting(kind: str, count: int, seed: int, share: float, threads: int) -> None:
    x = between_nans(tensor_of(kind, count, torch.Generator().manual_seed(seed)))
    for k in {0, 1, max(1, round(share * count)), count}:
        expected = top_k_threshold_by_sorting(x, k).item()
        for isa in ISAS:
            with instruction_set(isa):
                actual = _native.top_k_threshold(x, k, threads)
            assert actual == expected or (math.isnan(actual) and math.isnan(expected))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("period", range(57, 64))
@pytest.mark.parametrize("large", [True, False])
def test_a_sample_that_misleads_costs_time_and_not_the_result(isa: str, period: int, large: bool) -> None:
    x = torch.rand(8192, generator=torch.Generator().manual_seed(0))
    x = torch.where((torch.arange(8192) % period < 8) == large, x + 1, x)
    for k in (10, 4000, 8000):
        with instruction_set(isa):
            assert _native.top_k_threshold(x, k, 2) == top_k_threshold_by_sorting(x, k)


def test_calls_from_several_python_threads_are_right() -> None:
    geometry = Geometry(20, 24, 24, (9, 9), padding=(1, 1))
    jobs = []
    for seed in range(8):
        operands = draw_operands(geometry, seed)
        choices, thresholds = zip(*(fresh(x, x.numel() // 10) for x in (operands.weight, operands.input)), strict=True)
        jobs.append((operands, choices, reference(operands, *thresholds)))
    with ThreadPoolExecutor(4) as pool:
        for job in [pool.submit(train_repeatedly, *job, count=5) for job in jobs]:
            job.result(timeout=60)


def train_repeatedly(operands: Operands, choices: tuple[Any, Any], expected: Results, count: int) -> None:
    for _ in range(count):
        assert_same(train(operands, *choices, threads=2)[0], expected)
