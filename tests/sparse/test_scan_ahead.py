"""The scan for a linear layer's next active weights, in the pass that updates them: the results are the same bits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from tests.sparse.operands import _native
from zerofl import SparseSGD, sparsify_
from zerofl.sparse import dispatch, in_backward

pytestmark = pytest.mark.skipif(dispatch.UNAVAILABLE is not None, reason="needs the kernels")

INPUTS, OUTPUTS = 1100, 70  # more than the kernels' blocks of 512 and 64, and no multiple of a vector


def made(**settings: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(9, INPUTS), nn.ReLU(), nn.Linear(INPUTS, OUTPUTS), nn.Linear(OUTPUTS, 4))
    sparsify_(model, 0.9, layers=["2"], **settings)
    return model


def step(model: Any, optimizer: torch.optim.Optimizer, batch: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(batch, 9, generator=generator), torch.randint(0, 4, (batch,), generator=generator)
    optimizer.zero_grad()
    torch.autograd.backward(F.cross_entropy(model(x), y))
    optimizer.step()


def was_scanned(optimizer: SparseSGD, model: Any) -> bool:
    return id(model[2].weight) in optimizer.scanned


def assert_same_with_and_without(between: Callable[[Any, int], object], batch: int = 8, **settings: Any) -> None:
    """Six steps with `between(model, number)` after each."""
    period = settings.pop("topk_period", 1)
    states = []
    for scan_ahead in (False, True):
        model = made(topk_period=period)
        optimizer = SparseSGD(model, **{"lr": 0.05, **settings}, scan_ahead=scan_ahead)
        for number in range(6):
            step(model, optimizer, batch, number)
            assert was_scanned(optimizer, model) <= scan_ahead
            between(model, number)
        states.append(model.state_dict())
    for name, expected in states[0].items():
        torch.testing.assert_close(states[1][name], expected, rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("batch", [1, 8, 64, 70])
@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9, "weight_decay": 1e-3}, {"lr": 30.0}, {"topk_period": 3}])
def test_the_results_are_the_same_bits(batch: int, settings: dict[str, Any]) -> None:
    assert_same_with_and_without(lambda model, number: None, batch, **settings)


def shrink(model: Any) -> None:
    with torch.no_grad():
        model[2].weight.mul_(torch.linspace(0.5, 2, INPUTS))


def spoil(model: Any) -> None:
    with torch.no_grad():
        model[2].weight[3, 5] = torch.nan


def replace(model: Any) -> None:
    model[2].weight.data = model[2].weight.data.flip(0)


def replace_twice(model: Any) -> None:
    """The memory of the first is free when the second is made; another type's rounding tells them apart."""
    model.bfloat16().float()


def prune_twice(model: Any) -> None:
    for _ in range(2):
        prune.l1_unstructured(model[2], "weight", 0.93)  # type: ignore[no-untyped-call]
        prune.remove(model[2], "weight")  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    "change",
    [
        shrink,
        spoil,
        replace,
        replace_twice,
        prune_twice,
        lambda model: model.load_state_dict({name: 2 * tensor for name, tensor in model.state_dict().items()}),
        lambda model: model.eval()(torch.ones(2, 9)) is model.train(),
        lambda model: model(torch.ones(2, 9)),
    ],
    ids=[
        "in place",
        "NaN",
        "other memory",
        "memory used again",
        "pruning",
        "load_state_dict",
        "evaluation",
        "a forward pass alone",
    ],
)
def test_what_comes_between_two_steps_is_seen(change: Callable[[Any], object]) -> None:
    assert_same_with_and_without(lambda model, number: change(model) if number in (1, 4) else None)


def test_only_small_batches_of_linear_layers_are_scanned() -> None:
    model = made()
    optimizer = SparseSGD(model, lr=0.05, scan_ahead=True)
    step(model, optimizer, 64, 0)
    scanned = in_backward.candidates_of(model[2].weight)
    assert scanned is not None
    assert not was_scanned(optimizer, model)  # once
    weight = model[2].weight.detach()
    choice = _native.TopK(weight.numel() // 10, model[2].weight_threshold)
    x, outputs = torch.randn(INPUTS, 3), torch.zeros(2, OUTPUTS, 3)
    read = _native.Linear(x, weight, None, outputs[0], choice, None, False, 2)
    chosen = _native.Linear(x, torch.zeros_like(weight), None, outputs[1], choice, None, False, 2, scanned)
    assert torch.equal(outputs[0], outputs[1])  # of a weight that was not read
    assert outputs[0].abs().sum() > 0
    assert (chosen.weight_threshold, chosen.active_weights) == (read.weight_threshold, read.active_weights)
    step(model, optimizer, 65, 0)  # which leaves candidates of nothing
    empty = in_backward.candidates_of(model[2].weight)
    choice = _native.TopK(weight.numel() // 10, model[2].weight_threshold)
    missed = _native.Linear(x, torch.zeros_like(weight), None, outputs[1], choice, None, False, 2, empty)
    assert missed.weight_threshold == 0
    assert not outputs[1].any()


def test_of_many_active_weights_there_are_no_candidates() -> None:
    """They would take more memory than the gradient that SparseSGD spares."""
    weight, x = torch.randn(64, 100), torch.ones(100, 1)
    for k, are_kept in ((1600, True), (1601, False)):
        near = _native.top_k_threshold(weight, k, 2)
        layer = _native.Linear(x, weight, None, torch.empty(64, 1), _native.TopK(k, near), _native.TopK(9), False, 2)
        candidates = _native.Candidates()
        layer.backward(torch.ones(64, 1), None, None, 2, _native.Sgd(weight, None, 0.0, 0.0, 0.0, candidates))
        found = torch.empty(64, 1)
        again = _native.Linear(
            x, torch.zeros_like(weight), None, found, _native.TopK(k, near), None, False, 2, candidates
        )
        assert (again.weight_threshold > 0) == are_kept


@pytest.mark.parametrize(
    ("shape", "k", "near"),
    [((OUTPUTS, INPUTS), 7000, 0.5), ((OUTPUTS, INPUTS), 70_000, None), ((INPUTS, OUTPUTS), 7000, None)],
    ids=["another threshold", "more than were found", "another shape"],
)
def test_candidates_that_do_not_fit_are_passed_over(shape: tuple[int, int], k: int, near: float | None) -> None:
    weight, x = torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(0)), torch.ones(INPUTS, 1)
    threshold = _native.top_k_threshold(weight, 7000, 2)
    layer = _native.Linear(
        x, weight, None, torch.empty(OUTPUTS, 1), _native.TopK(7000, threshold), _native.TopK(9), False, 2
    )
    candidates = _native.Candidates()
    layer.backward(torch.ones(OUTPUTS, 1), None, None, 2, _native.Sgd(weight, None, 0.0, 0.0, 0.0, candidates))
    x, weight = torch.ones(shape[1], 1), weight.reshape(shape)
    choice = _native.TopK(k, threshold if near is None else near)
    found, expected = (torch.empty(shape[0], 1) for _ in range(2))
    other = _native.Linear(x, weight, None, found, choice, None, False, 2, candidates)
    assert _native.Linear(x, weight, None, expected, choice, None, False, 2).active_weights == other.active_weights
    assert other.weight_threshold == _native.top_k_threshold(weight, k, 2)
    assert torch.equal(found, expected)


def test_a_step_has_the_candidates_that_it_was_given() -> None:
    weight = torch.ones(8, 5)
    sgd = _native.Sgd(weight, torch.zeros(8, 5), 0.1, 0.9, 0.0, _native.Candidates())
    assert isinstance(sgd.candidates, _native.Candidates)
    assert _native.Sgd(weight, None, 0.1, 0.0, 0.0).candidates is None
