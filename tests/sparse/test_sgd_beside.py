"""SparseSGD beside others who want gradients: DistributedDataParallel, hooks, other optimisers of the same model."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

from tests.sparse.test_sgd import ATOL, assert_same, backward, small, step
from zerofl import SparseSGD, sparsify_
from zerofl.sparse import dispatch
from zerofl.sparse.in_backward import Applied

pytestmark = pytest.mark.skipif(dispatch.UNAVAILABLE is not None, reason="needs the kernels")


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    if not distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def with_norm() -> tuple[Any, Tensor, Tensor]:
    """`small`, and a convolution with its normalisation in the middle."""
    model, x, y = small()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        pair = [nn.Conv2d(5, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5)]
    model = nn.Sequential(*model[:2], *pair, *model[2:])
    sparsify_(model, 0.8, layers=["2", "4", "7"])
    return model, x, y


@pytest.mark.parametrize("settings", [{}, {"gradient_as_bucket_view": True}, {"static_graph": True}])
def test_distributed_data_parallel_gets_the_gradients(group: None, settings: dict[str, Any]) -> None:
    models = []
    for kind in (torch.optim.SGD, SparseSGD):
        model, x, y = with_norm()
        of: Any = model if kind is SparseSGD else model.parameters()
        optimizer = kind(of, lr=0.1, momentum=0.9)
        parallel = nn.parallel.DistributedDataParallel(model, **settings)
        for _ in range(3):
            step(parallel, optimizer, x, y)
            assert all(type(model[i].weight.grad) is Tensor for i in (2, 4, 7))
        models.append(model)
    assert_same(models[0], models[1], atol=0.0)


def test_a_model_that_was_in_it_takes_its_steps_again_by_itself(group: None) -> None:
    model, x, y = with_norm()
    optimizer = SparseSGD(model, lr=0.1)
    step(nn.parallel.DistributedDataParallel(model), optimizer, x, y)
    step(model, optimizer, x, y)
    assert all(isinstance(model[i].weight.grad, Applied) for i in (2, 4, 7))


def test_a_hook_behind_the_accumulation_sees_the_gradient() -> None:
    model, x, y = small()
    optimizer = SparseSGD(model, lr=0.1)
    seen: list[Any] = []
    model[5].weight.register_post_accumulate_grad_hook(lambda weight: seen.append(weight.grad.clone()))
    step(model, optimizer, x, y)
    plain = small()[0]
    step(plain, torch.optim.SGD(plain.parameters(), lr=0.1), x, y)
    assert torch.equal(seen[0], plain[5].weight.grad)
    assert isinstance(model[2].weight.grad, Applied)
    assert_same(plain, model, atol=max(ATOL, 1e-7))


def test_a_hook_that_cannot_be_seen_is_named() -> None:
    model, x, y = small()
    optimizer = SparseSGD(model, lr=0.1)
    weight = model[5].weight
    accumulation = weight.view_as(weight).grad_fn.next_functions[0][0]
    accumulation.register_hook(lambda *_: weight.grad / 2 and None)
    with pytest.raises(RuntimeError, match="for a hook on its AccumulateGrad to average"):
        backward(model(x), y)
    del optimizer


OTHERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "SGD with momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "SGD, foreach": lambda parameters: torch.optim.SGD(parameters, lr=0.1, foreach=True),
    "SGD, fused": lambda parameters: torch.optim.SGD(parameters, lr=0.1, fused=True),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.1),
    "Adam, foreach": lambda parameters: torch.optim.Adam(parameters, lr=0.1, foreach=True),
    "Adam, fused": lambda parameters: torch.optim.Adam(parameters, lr=0.1, fused=True),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
    "RMSprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.1),
    "Adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.1),
    "Rprop": lambda parameters: torch.optim.Rprop(parameters, lr=0.1),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_optimiser_of_the_same_model_is_told_who_takes_the_steps(other: str) -> None:
    model, x, y = small()
    optimizer = SparseSGD(model, lr=0.1)
    backward(model(x), y)
    weight = model[5].weight.detach().clone()
    with pytest.raises(RuntimeError, match="another optimiser's step.* delete the SparseSGD"):
        OTHERS[other](model.parameters()).step()
    assert torch.equal(model[5].weight, weight)
    del optimizer
    step(model, OTHERS[other](model.parameters()), x, y)
    assert not torch.equal(model[5].weight, weight)


def test_hooks_of_steps_are_called_once_whatever_was_made_before() -> None:
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)  # which wraps torch.optim.SGD.step for hooks
    last = nn.Linear(20, 3)
    model = nn.Sequential(nn.Linear(20, 20), last)
    sparsify_(model, 0.5, layers=["0"])
    optimizer = SparseSGD(model, lr=0.1)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    before = last.weight.detach().clone()
    model(torch.randn(4, 20)).sum().backward()
    optimizer.step()
    assert calls == ["before", "after"]
    assert not torch.equal(last.weight, before)


def test_of_two_sparse_ones_the_last_takes_the_steps() -> None:
    model, x, y = small()
    first, last = SparseSGD(model, lr=0.1), SparseSGD(model, lr=0.2)
    first.zero_grad()
    backward(model(x), y)
    biases = model[5].bias.detach().clone()
    with pytest.raises(RuntimeError, match=r"another took the step on a weight \(19, 5, 3, 3\).*made last"):
        first.step()
    assert torch.equal(model[5].bias, biases)  # before anything has changed
    last.step()
    plain = small()[0]
    step(plain, torch.optim.SGD(plain.parameters(), lr=0.2), x, y)
    assert_same(plain, model, atol=max(ATOL, 1e-7))


def test_a_step_that_fails_leaves_the_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = small()
    optimizer = SparseSGD(model, lr=0.1)
    backward(model(x), y)
    before = model[5].weight.grad
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    assert before is not None
    assert model[5].weight.grad is before
