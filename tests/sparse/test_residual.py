"""Residuals that are not the ordinary ones: of a shape that broadcasts, and with what is not a number in them."""

import copy

import pytest
import torch
from torch import Tensor, nn

from zerofl.sparse import blocks
from zerofl.sparse.layers import Backend
from zerofl.sparse.sparsify import sparsify_

from .operands import ISAS, instruction_set


def pair(backend: Backend = "auto") -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5))
    sparsify_(model, 0.5, layers=["0"], backend=backend)
    return model


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape)))


def step(model: nn.Sequential, residual: Tensor, one: bool) -> list[Tensor | None]:
    """Output, gradients and buffers of a step of relu(norm(convolution(x)) + residual), as one operation or as two."""
    x, residual = draw(4, 3, 6, 7).requires_grad_(), residual.clone().requires_grad_()
    if one:
        y = blocks.conv_norm_relu(model[0], model[1], x, residual)
    else:
        y = blocks.norm_relu(model[1], model[0](x), residual)
    torch.autograd.backward(y, draw(*y.shape))
    return [y.detach(), x.grad, residual.grad, *(p.grad for p in model.parameters()), *model.buffers()]


SHAPES = [(1, 5, 1, 1), (4, 5, 1, 1), (5, 1, 1), (1,), (), (1, 5, 6, 7), (4, 1, 6, 7), (3, 4, 5, 6, 7)]


@pytest.mark.parametrize("one", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_residual_may_broadcast(shape: tuple[int, ...], one: bool) -> None:
    found, expected = step(pair(), draw(*shape), one), step(pair("reference"), draw(*shape), one=False)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_residual_that_does_not_fit_is_refused_in_pytorchs_words() -> None:
    with pytest.raises(RuntimeError, match="must match the size of tensor b"):
        step(pair(), draw(4, 5, 6, 6), one=True)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("one", [True, False])
@pytest.mark.parametrize("count", [1, 4, 37])
def test_relu_lets_the_gradient_of_a_nan_through_as_pytorchs_does(count: int, one: bool, isa: str) -> None:
    """A NaN in a residual alone: the statistics of its channel are finite, and so is the gradient of all else."""
    residual = draw(4, 5, 6, 7)
    residual.view(-1)[torch.randperm(residual.numel(), generator=torch.Generator().manual_seed(0))[:count]] = torch.nan
    with instruction_set(isa):
        found = step(pair(), residual, one)
    expected = step(pair("reference"), residual, one=False)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert all(gradient.isfinite().all() for gradient in found[1:] if gradient is not None)


def test_one_operation_is_the_two_with_a_nan() -> None:
    residual = draw(4, 5, 6, 7)
    residual[1, 2, 3, 4] = torch.nan
    model = pair()
    for ours, theirs in zip(step(copy.deepcopy(model), residual, True), step(model, residual, False), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
