"""Chains of layers in an nn.Sequential of the user's own: one operation where they can be, and else as they were."""

import copy
import io
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zerofl import SparseConv2d, SparseSGD, bake_, densify_, sparsify_
from zerofl.sparse import blocks, layout

from .operands import ISAS, instruction_set


@pytest.fixture
def ones(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether ReLU was in it, of each pair that was one operation."""
    seen: list[bool] = []
    real = blocks._as_one

    def record(convolution: Any, norm: Any, x: Tensor, residual: Tensor | None, relu: bool = True) -> Any:
        seen.append(relu)
        return real(convolution, norm, x, residual, relu)

    monkeypatch.setattr(blocks, "_as_one", record)
    return seen


def vgg(bias: bool = True, inplace: bool = True) -> Any:
    """As torchvision's vgg11_bn begins, and with a pair that has no ReLU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Sequential(
                nn.Conv2d(3, 8, 3, padding=1, bias=bias), nn.BatchNorm2d(8), nn.ReLU(inplace), nn.MaxPool2d(2),
                nn.Conv2d(8, 12, 3, padding=1, bias=bias), nn.BatchNorm2d(12), nn.ReLU(inplace),
                nn.Conv2d(12, 12, 3, stride=2, bias=bias), nn.BatchNorm2d(12), nn.Sigmoid(),
            ),
            nn.Flatten(),
            nn.Linear(12 * 9, 5),
        )  # fmt: skip


def images(count: int = 6) -> Tensor:
    return torch.randn(count, 3, 14, 14, generator=torch.Generator().manual_seed(3))


def one_by_one(model: nn.Module, x: Tensor) -> Tensor:
    """What nn.Sequential does."""
    for module in model if isinstance(model, nn.Sequential) else []:
        x = one_by_one(module, x) if isinstance(module, nn.Sequential) else module(x)
    return x


def step(model: nn.Module, run: Callable[[nn.Module, Tensor], Tensor] = lambda model, x: model(x)) -> list[Any]:
    """The bits of output, input gradient, gradients and buffers after a step, and what each layer has chosen."""
    x = images().requires_grad_()
    y = run(model, x)
    F.cross_entropy(y, torch.arange(6) % 5).backward()  # type: ignore[no-untyped-call]
    tensors = [y.detach(), x.grad, *(p.grad for p in model.parameters()), *model.buffers()]
    chosen = [(m.weight_threshold, m.activation_threshold) for m in model.modules() if isinstance(m, SparseConv2d)]
    return [*(None if t is None else t.flatten().contiguous().view(torch.uint8).tolist() for t in tensors), chosen]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("storage", ["float32", "float16"])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_chain_is_its_layers_bit_for_bit(bias: bool, inplace: bool, storage: str, isa: str, ones: list[bool]) -> None:
    model = vgg(bias, inplace)
    sparsify_(model, 0.8, storage=storage)
    twin = copy.deepcopy(model)
    with instruction_set(isa):
        for _ in range(2):
            expected = step(twin, one_by_one)
            assert not ones
            assert step(model) == expected
            assert ones == [True, True, False]
            ones.clear()


@pytest.mark.parametrize("frozen", ["0.4.weight", "0.4.bias", "0.5.weight", "0.5.bias"])
def test_frozen_parameters_get_no_gradient(frozen: str) -> None:
    model = vgg()
    sparsify_(model, 0.8)
    model.get_parameter(frozen).requires_grad_(False)
    twin = copy.deepcopy(model)
    assert step(model) == step(twin, one_by_one)
    assert model.get_parameter(frozen).grad is None


def test_its_steps_may_be_taken_in_the_backward_pass(ones: list[bool]) -> None:
    states = []
    for run in (lambda model, x: model(x), one_by_one):
        model = vgg()
        sparsify_(model, 0.8)
        optimizer = SparseSGD(model, lr=0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(run(model, images()), torch.arange(6) % 5).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        states.append(model.state_dict())
    assert len(ones) == 9
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


def test_the_container_is_what_it_was() -> None:
    model: Any = nn.Sequential(OrderedDict(features=vgg(), head=nn.Identity()))
    names, text, keys = (
        [n for n, _ in model.named_modules()],
        str(nn.Sequential(OrderedDict(last=nn.ReLU()))),
        list(model.state_dict()),
    )
    sparsify_(model, 0.8)
    assert [n for n, _ in model.named_modules()] == names
    assert list(model.state_dict()) == keys
    inner: Any = model.features[0]
    assert issubclass(type(inner), nn.Sequential)
    assert len(inner) == 10
    assert list(inner)[4] is inner[4]
    assert [type(m).__name__ for m in inner[4:6]] == ["SparseConv2d", "BatchNorm2d"]
    assert str(inner[2:3]) == text.replace("(last): ReLU()", "(2): ReLU(inplace=True)")
    inner.append(nn.Tanh()), inner.insert(0, nn.Identity()), inner.pop(0)
    assert len(inner + nn.Sequential(nn.ReLU())) == 12


def test_copies_and_files_have_it_too(ones: list[bool]) -> None:
    model = vgg()
    sparsify_(model, 0.8)
    kept = io.BytesIO()
    torch.save(model, kept)
    kept.seek(0)
    for twin in (copy.deepcopy(model), torch.load(kept, weights_only=False)):
        ones.clear()
        expected = step(copy.deepcopy(model), one_by_one)
        assert step(twin) == expected
        assert len(ones) == 3


@pytest.mark.parametrize("undo", [densify_, bake_, lambda m: sparsify_(m, 0.8, backend="reference")])
def test_the_container_is_pytorchs_again(undo: Callable[[nn.Module], object]) -> None:
    model = vgg()
    sparsify_(model, 0.8)
    assert type(model[0]) is blocks.Sequential
    undo(model)
    assert type(model) is type(model[0]) is nn.Sequential
    x = images()
    torch.testing.assert_close(model(x), one_by_one(model, x), rtol=0, atol=0)


def test_a_container_with_a_forward_of_its_own_keeps_it() -> None:
    class Twice(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)  # type: ignore[no-any-return,no-untyped-call]

    model = nn.Sequential(nn.Conv2d(3, 8, 3), Twice(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()))
    sparsify_(model, 0.5, layers=["1.0"])
    assert type(model[1]) is Twice


WATCHES: dict[str, Callable[[nn.Module, list[Any]], object]] = {
    "hook": lambda module, seen: module.register_forward_hook(lambda *_: seen.append(1)),
    "pre-hook": lambda module, seen: module.register_forward_pre_hook(lambda *_: seen.append(1)),
    "backward hook": lambda module, seen: module.register_full_backward_hook(lambda *_: seen.append(1)),
    "own forward": lambda module, seen: setattr(module, "forward", module.forward),
}


@pytest.mark.parametrize("at", [4, 5, 6])
@pytest.mark.parametrize("watch", WATCHES)
def test_who_watches_a_layer_sees_it_called(watch: str, at: int, ones: list[bool]) -> None:
    seen: list[Any] = []
    model = vgg(inplace=False)
    sparsify_(model, 0.8)
    twin = copy.deepcopy(model)
    WATCHES[watch](model[0][at], seen)
    expected = step(twin, one_by_one)
    assert step(model) == expected
    assert ones == ([True, False, False] if at == 6 else [True, False])
    assert len(seen) == (watch != "own forward")


def test_a_hook_of_all_modules_sees_every_layer(ones: list[bool]) -> None:
    seen: list[Any] = []
    model = vgg()
    sparsify_(model, 0.8)
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    try:
        step(model)
    finally:
        handle.remove()
    assert not ones
    assert (seen.count(layout.BatchNorm2d), seen.count(nn.ReLU)) == (3, 2)


def test_elsewhere_the_layers_are_called_one_by_one(ones: list[bool]) -> None:
    model = vgg()
    sparsify_(model, 0.8)
    with torch.no_grad():
        model(images())
    model.eval()(images())
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        model(images())
    checkpoint(model[0], images().requires_grad_(), use_reentrant=True)
    assert not ones
    model[0][5].eval()
    model(images())
    assert ones == [True, False]
    with pytest.raises(RuntimeError, match="expected input"):
        model(images()[:, :2])
    with pytest.raises(TypeError, match="Tensor"):
        model((images(),))


@pytest.mark.filterwarnings("error:Dynamo")
def test_it_compiles() -> None:
    model = vgg()
    sparsify_(model, 0.8)
    twin = copy.deepcopy(model)
    found = step(torch.compile(model, backend="eager"))  # type: ignore[arg-type]
    assert found[:2] == step(twin)[:2]
