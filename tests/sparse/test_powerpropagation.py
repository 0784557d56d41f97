"""Powerpropagation's step: by hand, by the kernels of each instruction set, and as SparseSGD takes it."""

import copy
import io
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zerofl import SparseSGD, sparsify_
from zerofl.sparse import dispatch
from zerofl.sparse.powerpropagation import powered_step_

needs_kernels = pytest.mark.skipif(dispatch.UNAVAILABLE is not None, reason="needs the kernels")


def test_a_step_by_hand() -> None:
    # alpha = 2: w = v |v|, so v = sign(w) sqrt|w|, and the gradient of v is 2 |v| times that of w.
    weight = torch.tensor([0.25, -0.25, 0.0, 0.01, 0.36])
    powered_step_(weight, torch.tensor([1.0, 1.0, 7.0, 10.0, 0.0]), None, 0.1, 0.0, 0.0, 2.0)
    # v: 0.5 - 0.1, -0.5 - 0.1, 0, 0.1 - 0.1 * 2, 0.6
    torch.testing.assert_close(weight, torch.tensor([0.16, -0.36, 0.0, -0.01, 0.36]))
    assert weight[2] == 0
    assert weight[4] == torch.tensor(0.36)  # all of its bits


def test_momentum_and_weight_decay_are_those_of_v() -> None:
    weight, velocity = torch.tensor([0.25]), torch.tensor([2.0])
    powered_step_(weight, torch.tensor([1.0]), velocity, 0.1, 0.5, 0.4, 2.0)
    # v = 0.5; its gradient 1 * 2 * 0.5 + 0.4 * 0.5 = 1.2; velocity 0.5 * 2 + 1.2 = 2.2; v = 0.5 - 0.22 = 0.28
    torch.testing.assert_close(velocity, torch.tensor([2.2]))
    torch.testing.assert_close(weight, torch.tensor([0.28**2]))


@needs_kernels
@pytest.mark.parametrize("rest", [{"momentum": 0.0, "weight_decay": 0.0}, {"momentum": 0.9, "weight_decay": 0.01}])
@pytest.mark.parametrize("alpha", [1.0001, 1.25, 1.5, 2.0])
def test_the_kernels_step_is_the_plain_one(alpha: float, rest: dict[str, float]) -> None:
    generator = torch.Generator().manual_seed(0)
    outputs, inputs = 37, 53  # neither divides a vector
    weight = torch.randn(outputs, inputs, generator=generator) * 10 ** (
        8 * torch.rand(outputs, inputs, generator=generator) - 6
    )
    special = [0.0, -0.0, 1e-40, -1e-38, 1.1754944e-38, 1e-30, -1e30, 3e38, math.inf, -math.inf, math.nan]
    weight.view(-1)[: len(special)] = torch.tensor(special)
    weight[:, 7:9] = 0.0
    velocity = torch.randn(outputs, inputs, generator=generator)
    x, grad_output = torch.randn(inputs, 1, generator=generator), torch.randn(outputs, 1, generator=generator)
    x[11:20] = 0.0  # inputs without a gradient
    grad_output[3] = 1e30
    native = dispatch.native
    layer = native.Linear(x, weight, None, torch.empty(outputs, 1), native.TopK(99), native.AtLeast(0.0), True, 1)
    gradient = grad_output * x.T
    expected, expected_velocity = weight.clone(), velocity.clone()
    of_plain = expected_velocity if rest["momentum"] else None
    powered_step_(expected, gradient, of_plain, 0.1, **rest, alpha=alpha)
    found, found_velocity = weight.clone(), velocity.clone()
    of_kernel = found_velocity if rest["momentum"] else None
    step = native.Sgd(found, of_kernel, 0.1, rest["momentum"], rest["weight_decay"], None, alpha)
    layer.backward(grad_output, None, None, 1, step)
    # What is below the least normal number rests.
    size = weight.abs()
    usual = (size >= torch.finfo(torch.float32).tiny) | (weight == 0)
    assert (~usual & weight.isfinite()).sum() == 2
    assert torch.equal(found.isfinite(), expected.isfinite())
    # An error is small beside the largest term of the sum that it comes of; the larger its exponent, the fewer digits
    # are left of its logarithm's fraction.
    v = size ** (1 / alpha)
    moves = gradient.abs() * alpha * v ** (alpha - 1) + rest["momentum"] * velocity.abs() + rest["weight_decay"] * v
    terms = v + 0.1 * moves
    share = 3e-6 + 1e-7 * torch.maximum(terms.clamp(min=1e-37).log2().abs(), size.clamp(min=1e-38).log2().abs())
    for result, plain, bound in (
        (found, expected, share * alpha * terms**alpha),
        (found_velocity, expected_velocity, share * moves),
    ):
        assert ((result - plain).abs() <= bound)[usual & plain.isfinite() & bound.isfinite()].all()
    if not rest["momentum"]:
        assert torch.equal(found[:, 11:20].nan_to_num(), weight[:, 11:20].nan_to_num())
        assert not found[:, 7:9].count_nonzero()


@needs_kernels
@pytest.mark.parametrize("alpha", [1.0001, 1.25, 1.5, 2.0])
def test_steps_around_where_the_series_ends_are_exact(alpha: float) -> None:
    # From w = 1, where v is 1 too, a step multiplies it by (1 + x)^alpha; the series is taken below |x| = 1/8.
    x = torch.tensor([1e-6, 0.01, 0.0625, 0.12, 0.1249, 0.1251, 0.13, 0.5]).repeat(40)
    x[::2] *= -1
    weight = torch.ones(32, len(x))  # whole lines of them
    native = dispatch.native
    layer = native.Linear(
        x.view(-1, 1), weight, None, torch.empty(32, 1), native.TopK(99), native.AtLeast(0.0), True, 1
    )
    found = weight.clone()
    rate = 0.5
    layer.backward(
        torch.full((32, 1), -1 / (rate * alpha)), None, None, 1, native.Sgd(found, None, rate, 0.0, 0.0, None, alpha)
    )
    expected = (1 + x.double()) ** alpha
    share = (found - expected).abs() / expected
    assert share[:, x.abs() < 0.125].max() < 1.5e-7
    assert share.max() < 1e-6


@needs_kernels
def test_the_exponent_is_checked() -> None:
    for wrong in (0.99, 2.01, math.nan):
        with pytest.raises(ValueError, match="power: expected 1 to 2"):
            dispatch.native.Sgd(torch.zeros(3), None, 0.1, 0.0, 0.0, None, wrong)
        with pytest.raises(ValueError, match="powerpropagation = .*: expected 1 .plain SGD. to 2"):
            SparseSGD(small(), 0.1, powerpropagation=wrong)


def small() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 9, 3), nn.ReLU(), nn.Conv2d(9, 19, 3), nn.Flatten(), nn.Linear(475, 33))
    sparsify_(model, 0.8, layers=["2", "4"])
    return model


def step(model: Any, optimizer: torch.optim.Optimizer) -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(8, 3, 9, 9, generator=generator), torch.randint(0, 33, (8,), generator=generator)
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def weights(model: Any) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in model.state_dict().values()]


@pytest.mark.parametrize("rest", [{}, {"momentum": 0.9}, {"momentum": 0.9, "weight_decay": 0.01}])
@pytest.mark.parametrize("scan_ahead", [False, True])
def test_steps_in_the_backward_pass_and_after_it_are_the_same(rest: dict[str, Any], scan_ahead: bool) -> None:
    """With a hook on a weight its gradient is computed, as on the reference; the other parameters are plain SGD's."""
    models = []
    for is_hooked in (False, True):
        model = small()
        optimizer = SparseSGD(model, 0.1, **rest, scan_ahead=scan_ahead, powerpropagation=1.25)
        if is_hooked:
            for layer in (model[2], model[4]):
                layer.weight.register_hook(lambda gradient: None)
        for _ in range(2):
            step(model, optimizer)
        assert not torch.equal(model[4].weight, small()[4].weight)
        models.append(weights(model))
    for found, expected in zip(*models, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    plain = small()
    step(plain, SparseSGD(plain, 0.1, **rest))
    powered = small()
    step(powered, SparseSGD(powered, 0.1, **rest, powerpropagation=1.25))
    same = [torch.equal(a, b) for a, b in zip(weights(plain), weights(powered), strict=True)]
    assert same == [True, True, False, True, False, True]  # weight and bias of a dense layer, and of two sparse ones


def test_copies_and_pickles_keep_the_exponent() -> None:
    model = small()
    optimizer = SparseSGD(model, 0.1, powerpropagation=1.25)
    step(model, optimizer)
    optimizer.zero_grad()
    kept = io.BytesIO()
    torch.save((model, optimizer), kept)
    kept.seek(0)
    for other_model, other in (copy.deepcopy((model, optimizer)), torch.load(kept, weights_only=False)):
        assert other.powerpropagation == 1.25
        step(other_model, other)
    step(model, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(other_model), strict=True))


def test_what_it_does_not_know_is_an_error_and_no_other_step() -> None:
    model = small()
    optimizer = SparseSGD(model, 0.1, momentum=0.9, powerpropagation=1.25)
    optimizer.param_groups[0]["nesterov"] = True
    before = weights(model)
    with pytest.raises(RuntimeError, match="leave nesterov, maximize, dampening and differentiable"):
        step(model, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(weights(model), before, strict=True))
