"""SparseSGD beside torch.optim.SGD, and everything that could go wrong when a step is taken in the backward pass."""

import copy
import gc
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zerofl import SparseSGD, sparsify_
from zerofl.models import build_model
from zerofl.sparse import dispatch
from zerofl.sparse.in_backward import Applied

pytestmark = pytest.mark.skipif(dispatch.UNAVAILABLE is not None, reason="needs the kernels")

Settings = dict[str, Any]
SETTINGS: list[Settings] = [
    {"lr": 0.1},
    {"lr": 0.05, "momentum": 0.9},
    {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3},
]
# The rounding is that of torch.optim.SGD where both have a fused multiply-add.
ATOL = 1e-5 if dispatch.UNAVAILABLE or dispatch.isa() == "baseline" else 0.0


def small(batch: int = 8, seed: int = 0) -> tuple[Any, Tensor, Tensor]:
    """A model with a sparse convolution and two linears, of sizes that no vector divides; a batch of its data."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 19, 3, stride=2), nn.ReLU(), nn.Flatten(),
            nn.Linear(19 * 9, 33), nn.ReLU(), nn.Linear(33, 4),
        )  # fmt: skip
    sparsify_(model, 0.8, layers=["2", "5"])
    return model, torch.randn(batch, 3, 9, 9, generator=generator), torch.randint(0, 4, (batch,), generator=generator)


def backward(output: Tensor, y: Tensor) -> Tensor:
    loss = F.cross_entropy(output, y)
    torch.autograd.backward(loss)
    return loss


def step(model: Any, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss = backward(model(x), y)
    optimizer.step()
    return loss


def both(train: Callable[[Any, Any], None], settings: Settings, batch: int = 8) -> tuple[Any, Any]:
    """Two models trained alike, with torch.optim.SGD and with SparseSGD."""
    plain, fused = small(batch)[0], small(batch)[0]
    train(plain, torch.optim.SGD(plain.parameters(), **settings))
    train(fused, SparseSGD(fused, **settings))
    return plain, fused


def assert_same(plain: nn.Module, fused: nn.Module, atol: float = ATOL) -> None:
    for (name, expected), found in zip(plain.state_dict().items(), fused.state_dict().values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=atol, msg=lambda text: f"{name}: {text}")  # noqa: B023


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize(("name", "shape"), [("resnet18", (8, 3, 32, 32)), ("leaf_cnn", (4, 1, 28, 28))])
def test_ten_steps_are_those_of_sgd(name: str, shape: tuple[int, ...], settings: Settings) -> None:
    generator = torch.Generator().manual_seed(1)
    batches = [
        (torch.randn(shape, generator=generator), torch.randint(0, 10, shape[:1], generator=generator))
        for _ in range(10)
    ]
    models: list[Any] = []
    for kind in (torch.optim.SGD, SparseSGD):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = build_model(name, 10, shape[1], 16)
        before = copy.deepcopy(model.state_dict())
        sparsify_(model, 0.9)
        of: Any = model if kind is SparseSGD else model.parameters()
        optimizer = kind(of, **settings)
        for x, y in batches:
            step(model, optimizer, x, y)
        assert all((model.get_parameter(n) != before[n]).any() for n in before if n.endswith("weight"))
        models.append(model)
    assert_same(models[0], models[1])


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("batch", [1, 8, 70])
def test_sizes_that_no_vector_divides(batch: int, settings: Settings) -> None:
    _, x, y = small(batch)

    def train(model: Any, optimizer: Any) -> None:
        for _ in range(4):
            step(model, optimizer, x, y)

    assert_same(
        *both(train, settings, batch), atol=max(ATOL, 1e-7)
    )  # the ends of rows are rounded as the compiler likes


def test_no_gradient_of_a_sparse_layer_is_in_memory() -> None:
    model, x, y = small()
    optimizer = SparseSGD(model, lr=0.1)
    before = model[5].weight.detach().clone()
    backward(model(x), y)
    for layer in (model[2], model[5]):
        assert isinstance(layer.weight.grad, Applied)
        assert "taken in the backward pass" in repr(layer.weight.grad)
    assert not torch.equal(model[5].weight, before)  # before step()
    assert type(model[0].weight.grad) is Tensor
    optimizer.zero_grad()
    assert model[5].weight.grad is None


def test_schedulers_closures_and_a_resumed_state() -> None:
    _, x, y = small()

    def train(model: Any, optimizer: Any) -> None:
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        for _ in range(2):
            step(model, optimizer, x, y)
            scheduler.step()
        # Saved, and resumed by another optimiser of the same model.
        kept = io.BytesIO()
        torch.save(optimizer.state_dict(), kept)
        kept.seek(0)
        resumed = type(optimizer)(model if isinstance(optimizer, SparseSGD) else model.parameters(), lr=9.0)
        resumed.load_state_dict(torch.load(kept))
        assert resumed.param_groups[0]["lr"] == 0.05 / 4

        def closure() -> Tensor:
            resumed.zero_grad()
            return backward(model(x), y)

        for _ in range(2):
            assert resumed.step(closure) > 0

    assert_same(*both(train, {"lr": 0.05, "momentum": 0.9}), atol=max(ATOL, 1e-7))


@pytest.mark.parametrize(
    "use",
    [
        lambda model: nn.utils.clip_grad_norm_(model.parameters(), 1.0),
        lambda model: nn.utils.clip_grad_value_(model.parameters(), 1.0),
        lambda model: model[5].weight.grad + 1,
        lambda model: model[5].weight.grad.mul_(2),
        lambda model: model.zero_grad(set_to_none=False),
    ],
    ids=["clip_grad_norm_", "clip_grad_value_", "read", "scaled", "set to zero"],
)
def test_what_needs_the_gradient_says_why_there_is_none(use: Callable[[Any], object]) -> None:
    model, x, y = small()
    SparseSGD(model, lr=0.1)
    optimizer = SparseSGD(model, lr=0.1)
    backward(model(x), y)
    with pytest.raises(RuntimeError, match="SparseSGD took the step with it in the backward pass"):
        use(model)
    optimizer.zero_grad()
    step(model, optimizer, x, y)  # as if nothing had happened


def test_gradients_are_not_accumulated_in_silence() -> None:
    model, x, y = small()
    optimizer = SparseSGD(model, lr=0.1)
    backward(model(x), y)
    weight = model[5].weight.detach().clone()
    with pytest.raises(
        RuntimeError, match=r"a second gradient of a sparse layer's weight \(33, 171\) before zero_grad"
    ):
        backward(model(x), y)
    assert torch.equal(model[5].weight, weight)
    optimizer.step()
    with pytest.raises(RuntimeError, match="before zero_grad"):  # step() is not zero_grad()
        backward(model(x), y)


def test_a_layer_that_is_used_twice_is_refused() -> None:
    layer = nn.Linear(6, 6)
    sparsify_(layer, 0.5, layers=[""])
    optimizer = SparseSGD(layer, lr=0.1)
    with pytest.raises(RuntimeError, match="a layer is used once"):
        torch.autograd.backward(layer(layer(torch.ones(2, 6))).sum())
    del optimizer


def test_a_weight_that_the_loss_needs_too_is_an_error() -> None:
    """Its old value, which autograd kept for the penalty, is gone: autograd notices."""
    model, x, y = small()
    optimizer = SparseSGD(model, lr=0.1)
    penalty = model[5].weight.square().sum()  # first, so that its backward pass comes last
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(F.cross_entropy(model(x), y) + penalty)
    del optimizer


def test_hooks_and_autograd_grad_get_the_gradient() -> None:
    model, x, y = small()
    optimizer = SparseSGD(model, lr=0.1)
    expected = torch.autograd.grad(F.cross_entropy(model(x), y), model[5].weight)[0]
    before = small()[0]
    assert_same(before, model, atol=0.0)  # asking changed nothing
    seen: list[Tensor] = []
    handle = model[5].weight.register_hook(seen.append)
    backward(model(x), y)
    assert torch.equal(seen[0], expected)
    assert torch.equal(model[5].weight.grad, expected)
    optimizer.step()
    handle.remove()
    plain = small()[0]
    step(plain, torch.optim.SGD(plain.parameters(), lr=0.1), x, y)
    assert_same(plain, model)


def test_some_gradients_alone() -> None:
    model, x, y = small()
    optimizer = SparseSGD(model, lr=0.1)
    weights = [model[i].weight.detach().clone() for i in (2, 5)]
    torch.autograd.backward(F.cross_entropy(model(x), y), inputs=[model[2].weight])
    assert not torch.equal(model[2].weight, weights[0])
    assert torch.equal(model[5].weight, weights[1])
    optimizer.zero_grad()
    model[2].weight.requires_grad_(False)
    frozen = model[2].weight.detach().clone()
    step(model, optimizer, x, y)
    assert torch.equal(model[2].weight, frozen)
    assert not torch.equal(model[5].weight, weights[1])


def test_gradient_checkpointing() -> None:
    _, x, y = small()

    def train(model: Any, optimizer: Any) -> None:
        for _ in range(3):
            optimizer.zero_grad()
            backward(model[4:](checkpoint(model[:4], x, use_reentrant=False)), y)
            optimizer.step()

    assert_same(*both(train, {"lr": 0.1}), atol=max(ATOL, 1e-7))


def test_copies_and_other_optimisers_have_their_gradients() -> None:
    model, x, y = small()
    optimizer = SparseSGD(model, lr=0.1)
    twin = copy.deepcopy(model)
    backward(twin(x), y)
    assert type(twin[5].weight.grad) is Tensor
    assert_same(model, twin, atol=0.0)
    del optimizer
    gc.collect()
    backward(model(x), y)  # its optimiser is gone
    assert torch.equal(model[5].weight.grad, twin[5].weight.grad)


@pytest.mark.parametrize("key", ["nesterov", "maximize"])
def test_another_kind_of_step_is_torchs(key: str) -> None:
    _, x, y = small()

    def train(model: Any, optimizer: Any) -> None:
        optimizer.param_groups[0][key] = True
        for _ in range(2):
            step(model, optimizer, x, y)

    assert_same(*both(train, {"lr": 0.05, "momentum": 0.9}), atol=0.0)


def test_the_reference_has_gradients() -> None:
    model, x, y = small()
    sparsify_(model, 0.8, layers=["2", "5"], backend="reference")
    optimizer = SparseSGD(model, lr=0.1)
    step(model, optimizer, x, y)
    assert type(model[5].weight.grad) is Tensor


def test_a_model_can_be_moved_before_its_gradients_are_cleared() -> None:
    model, x, y = small()
    optimizer = SparseSGD(model, lr=0.1)
    step(model, optimizer, x, y)
    model.cpu().double().float()
    optimizer.zero_grad()
    step(model, optimizer, x, y)
