"""Operands for the tests of the native kernels: what every instruction set computes is compared with float64.

Integers of a few bits have products and sums that float32 holds exactly, so their results have to be equal bit by bit,
in whatever order a kernel adds them; and their many ties tell an active set that is not the specified one.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from zerofl.sparse import dispatch, swat
from zerofl.sparse.topk import top_k_threshold_by_sorting

pytest.importorskip("zerofl._native", reason="zerofl is installed without its native kernels")
_native = dispatch.native

ISAS: list[str] = _native.isas()
MARGIN = 67  # floats about a tensor that nobody may touch; odd, so that results do not begin on a cache line


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    before = _native.isa()
    _native.set_isa(name)
    try:
        yield
    finally:
        _native.set_isa(before)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def integers(shape: Sequence[int], generator: torch.Generator, largest: int = 8) -> Tensor:
    """Whole numbers in [-largest, largest] as float32, with NaN before and behind them in memory."""
    return between_nans(torch.randint(-largest, largest + 1, tuple(shape), generator=generator).float())


def normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return between_nans(torch.randn(tuple(shape), generator=generator))


def between_nans(x: Tensor) -> Tensor:
    """A contiguous copy of x which whoever reads past its ends finds out."""
    copy = blank(x.shape)
    copy.copy_(x)
    return copy


def blank(shape: Sequence[int], margin: int = MARGIN) -> Tensor:
    """A contiguous tensor of NaN, for a kernel to replace, with more NaN before and behind it, which it may not."""
    numel = torch.Size(shape).numel()
    return torch.full((numel + 2 * margin,), torch.nan)[margin : margin + numel].view(tuple(shape))


def surroundings(x: Tensor) -> Tensor:
    """What is before and behind x in the memory that `blank` has made."""
    memory = x.new_empty(0).set_(x.untyped_storage())
    return torch.cat([memory[: x.storage_offset()], memory[x.storage_offset() + x.numel() :]])


class Geometry(NamedTuple):
    """A convolution's sizes; each pair is (height, width)."""

    batch: int
    in_channels: int
    out_channels: int
    size: tuple[int, int]
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    @property
    def input(self) -> tuple[int, int, int, int]:
        return (self.in_channels, *self.size, self.batch)

    @property
    def weight(self) -> tuple[int, int, int, int]:
        return (self.out_channels, self.in_channels, *self.kernel)

    @property
    def out_size(self) -> tuple[int, ...]:
        """As `torch.nn.Conv2d` documents it."""
        return tuple(
            (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for size, kernel, stride, padding, dilation in zip(*self[3:], strict=True)
        )

    @property
    def output(self) -> tuple[int, ...]:
        return (self.out_channels, *self.out_size, self.batch)

    @property
    def is_linear(self) -> bool:
        return self.size == self.kernel == self.stride == (1, 1) and self.padding == (0, 0)

    @property
    def samples(self) -> tuple[int, ...]:
        """The input at every stride-th position."""
        height, width = (-(-size // stride) for size, stride in zip(self.size, self.stride, strict=True))
        return (self.in_channels, height, width, self.batch)

    @property
    def native(self) -> object:
        return _native.Geometry(self.input, self.weight, self.stride, self.padding, self.dilation)


class Operands(NamedTuple):
    """What a training step of a convolution reads; activations are [C, H, W, N]."""

    geometry: Geometry
    input: Tensor
    weight: Tensor
    bias: Tensor | None
    grad_output: Tensor
    addend: Tensor | None


def draw_operands(
    geometry: Geometry,
    seed: int,
    draw: Callable[[Sequence[int], torch.Generator], Tensor] = integers,
    bias: bool = True,
    addend: bool = True,
) -> Operands:
    generator = torch.Generator().manual_seed(seed)
    return Operands(
        geometry,
        draw(geometry.input, generator),
        draw(geometry.weight, generator),
        draw((geometry.out_channels,), generator) if bias else None,
        draw(geometry.output, generator),
        draw(geometry.samples, generator) if addend else None,
    )


class Results(NamedTuple):
    output: Tensor
    grad_input: Tensor
    grad_weight: Tensor


def train(operands: Operands, weight_choice: Any, input_choice: Any, threads: int) -> tuple[Results, float, float]:
    """The three products by the kernels in use, in memory that was NaN, and the thresholds of weight and input.

    A linear layer's geometry without an addend is computed as a linear layer, with one as a convolution.
    """
    g = operands.geometry
    results = Results(blank(g.output), blank(g.input), blank(g.weight))
    if g.is_linear and operands.addend is None:
        return train_linear(operands, results, weight_choice, input_choice, threads)
    convolution = _native.Convolution(
        g.native,
        operands.input,
        operands.weight,
        operands.bias,
        results.output,
        weight_choice,
        input_choice,
        True,
        threads,
    )
    convolution.backward(operands.grad_output, operands.addend, results.grad_input, results.grad_weight, threads)
    check_step(
        operands, results, lambda sgd: convolution.backward(operands.grad_output, None, None, None, threads, sgd)
    )
    for result in results:
        assert surroundings(result).isnan().all(), "a kernel wrote outside its result"
    return results, convolution.weight_threshold, convolution.input_threshold


def train_linear(
    operands: Operands, results: Results, weight_choice: Any, input_choice: Any, threads: int
) -> tuple[Results, float, float]:
    def matrix(x: Tensor) -> Tensor:
        """[C, 1, 1, N] or [O, C, 1, 1] -> its two dimensions, on the same memory."""
        return x.view(x.shape[0], -1)

    output, grad_input, grad_weight = map(matrix, results)
    x, w = matrix(operands.input), matrix(operands.weight)
    linear = _native.Linear(x, w, operands.bias, output, weight_choice, input_choice, True, threads)
    linear.backward(matrix(operands.grad_output), grad_input, grad_weight, threads)
    take = partial(linear.backward, matrix(operands.grad_output), None, None, threads)
    check_step(operands, results, take, matrix)
    for result in results:
        assert surroundings(result).isnan().all(), "a kernel wrote outside its result"
    return results, linear.weight_threshold, linear.input_threshold


def check_step(
    operands: Operands,
    results: Results,
    take: Callable[[Any], None],
    shaped: Callable[[Tensor], Tensor] = lambda x: x,
) -> None:
    """Compare a step of SGD that is taken in the place of grad_weight with one that is computed from it.

    In powers of two, so that integers are exact; the same with a velocity of ones.
    """
    for momentum in (0.0, 0.5):
        weight, velocity = blank(operands.geometry.weight), blank(operands.geometry.weight)
        weight.copy_(operands.weight)
        velocity.fill_(1.0)
        take(_native.Sgd(shaped(weight), shaped(velocity) if momentum else None, 0.25, momentum, 0.5))
        gradient = results.grad_weight + 0.5 * operands.weight + momentum
        are_integers = operands.weight.frac().count_nonzero() == 0
        atol = 0.0 if are_integers else 1e-6 * float(gradient.abs().nan_to_num(0, 0, 0).max())
        for found, expected in (
            (weight, operands.weight - 0.25 * gradient),
            (velocity, gradient if momentum else torch.ones_like(velocity)),
        ):
            torch.testing.assert_close(found, expected, rtol=0, atol=atol, equal_nan=True)
        for result in (weight, velocity):
            assert surroundings(result).isnan().all(), "a kernel wrote outside the weight"


def reference(operands: Operands, weight_threshold: float, input_threshold: float) -> Results:
    """The same by `zerofl.sparse.swat` in float64."""
    g = operands.geometry
    x = operands.input.permute(3, 0, 1, 2).double().requires_grad_()
    w = operands.weight.double().requires_grad_()
    bias = None if operands.bias is None else operands.bias.double()
    thresholds = torch.tensor(weight_threshold), torch.tensor(input_threshold)
    y = swat.Conv2d.apply(x, w, bias, *thresholds, g.stride, g.padding, g.dilation, 1)  # type: ignore[no-untyped-call]
    y.backward(operands.grad_output.permute(3, 0, 1, 2).double())
    assert x.grad is not None
    assert w.grad is not None
    grad_input = x.grad.permute(1, 2, 3, 0)
    if operands.addend is not None:
        grad_input[:, :: g.stride[0], :: g.stride[1]] += operands.addend
    return Results(y.detach().permute(1, 2, 3, 0), grad_input, w.grad)


def fresh(x: Tensor, k: int) -> tuple[Any, float]:
    """The choice of the k largest of x without a guess, and the threshold that it has to find."""
    return _native.TopK(k), top_k_threshold_by_sorting(x, k).item()


def assert_same(actual: Results, expected: Results) -> None:
    """Bit by bit, of results that float32 holds exactly."""
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs.float(), rtol=0, atol=0)
