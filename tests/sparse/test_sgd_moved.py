"""SparseSGD of a model that is copied, moved, saved or swapped between a backward pass and the next step."""

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import swap_tensors

from tests.sparse.test_sgd import ATOL, assert_same, backward, both, small, step
from zerofl import SparseSGD
from zerofl.sparse import dispatch
from zerofl.sparse.in_backward import Applied

pytestmark = pytest.mark.skipif(dispatch.UNAVAILABLE is not None, reason="needs the kernels")


@pytest.mark.parametrize(
    "move",
    [
        lambda model: model.share_memory(),
        lambda model: model.to_empty(device="cpu"),
        lambda model: model.double().float(),
        lambda model: model.to(memory_format=torch.channels_last).to(memory_format=torch.contiguous_format),
    ],
    ids=["share_memory", "to_empty", "double", "channels_last"],
)
def test_a_model_may_be_moved_before_zero_grad(move: Callable[[Any], object]) -> None:
    _, x, y = small()

    def train(model: Any, optimizer: Any) -> None:
        for _ in range(2):
            step(model, optimizer, x, y)
            state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            move(model)
            model.load_state_dict(state)
        assert isinstance(model[5].weight.grad, Applied) == isinstance(optimizer, SparseSGD)

    assert_same(*both(train, {"lr": 0.05}), atol=max(ATOL, 1e-7))


@pytest.mark.parametrize("scan_ahead", [False, True])
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"]
)
def test_a_copy_of_model_and_optimiser_steps_as_they_do(copied: Callable[[Any], Any], scan_ahead: bool) -> None:
    model, x, y = small()
    optimizer = SparseSGD(model, lr=0.1, momentum=0.9, scan_ahead=scan_ahead)
    step(model, optimizer, x, y)
    optimizer.zero_grad()
    twin, its = copied((model, optimizer))
    assert its.scan_ahead == scan_ahead
    for one, by in ((model, optimizer), (twin, its)):
        backward(one(x), y)
        assert isinstance(one[5].weight.grad, Applied)
        by.step()
    assert_same(model, twin, atol=0.0)


def test_a_step_is_taken_once() -> None:
    model, x, y = small()
    optimizer = SparseSGD(model, lr=0.1)
    step(model, optimizer, x, y)
    weight = model[0].weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"a second time since the backward pass"):
        optimizer.step()
    assert torch.equal(model[0].weight, weight)
    step(model, optimizer, x, y)


@pytest.mark.parametrize("kind", [torch.channels_last, torch.float64], ids=["another order", "another type"])
def test_a_velocity_that_the_kernels_cannot_read_is_torchs_to_use(kind: Any) -> None:
    _, x, y = small()

    def train(model: Any, optimizer: Any) -> None:
        in_kind = {"memory_format" if kind is torch.channels_last else "dtype": kind}
        step(model.to(**in_kind), optimizer, x.to(**in_kind), y)
        optimizer.zero_grad()
        model.to(torch.float32, memory_format=torch.contiguous_format)
        for _ in range(2):
            step(model, optimizer, x, y)

    assert_same(*both(train, {"lr": 0.05, "momentum": 0.9}), atol=max(ATOL, 1e-7))


def test_weights_can_be_swapped() -> None:
    _, x, y = small()

    def train(model: Any, optimizer: Any) -> None:
        step(model, optimizer, x, y)
        optimizer.zero_grad()
        swap_tensors(  # type: ignore[no-untyped-call]
            model[5].weight, torch.nn.Parameter(model[5].weight.detach().flip(0))
        )
        step(model, optimizer, x, y)

    assert_same(*both(train, {"lr": 0.05, "momentum": 0.9}), atol=max(ATOL, 1e-7))


def test_a_step_that_was_taken_cannot_be_saved() -> None:
    model, x, y = small()
    optimizer = SparseSGD(model, lr=0.1)
    step(model, optimizer, x, y)
    grad: Tensor = model[5].weight.grad
    with pytest.raises(TypeError, match=r"cannot be saved. Call zero_grad\(\) first"):
        pickle.dumps(grad)


def test_nothing_is_said_when_python_ends_with_an_optimizer_there() -> None:
    lines = """
import torch
from zerofl import SparseSGD, sparsify_
def made():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    sparsify_(model, 0.5, layers=["0"])
    optimizer = SparseSGD(model, 0.1)
    def step():
        optimizer.zero_grad()
        model(torch.ones(2, 8)).sum().backward()
        optimizer.step()
    return step
kept = made()
kept()
"""
    ended = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, check=True)
    assert ended.stderr == ""
