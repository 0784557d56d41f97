"""A convolution and its normalisation as one operation: to the last bit the two, and out of the way if asked."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zerofl.models import ResNet18
from zerofl.sparse import blocks, dispatch, kernels, layout
from zerofl.sparse.layers import Backend
from zerofl.sparse.sparsify import sparsify_

from .operands import ISAS, instruction_set, torch_threads

STORAGES = ("float32", "float16", "bfloat16")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each pair was one operation."""
    seen: list[bool] = []
    real = blocks._is_one

    def record(*arguments: Any) -> bool:
        seen.append(real(*arguments))
        return seen[-1]

    monkeypatch.setattr(blocks, "_is_one", record)
    return seen


def small_resnet(seed: int = 0) -> ResNet18:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ResNet18(classes=5, width=8)


def images(count: int = 6) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, input gradient, gradients, and buffers after a step forward and back."""
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().mean().backward()
    assert x.grad is not None
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None), *model.buffers()]


def equal(ones: list[Tensor], others: list[Tensor]) -> bool:
    return len(ones) == len(others) and all(torch.equal(a, b) for a, b in zip(ones, others, strict=True))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("count", [6, 16])
def test_one_operation_is_the_two_bit_for_bit(
    isa: str, storage: str, count: int, calls: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for one in (True, False):
        model = small_resnet()
        sparsify_(model, 0.8, storage=storage)
        with instruction_set(isa):
            if not one:
                monkeypatch.setattr(blocks, "_is_one", lambda *_: False)
            results.append([tensor for _ in range(2) for tensor in step(model, images(count))])
    assert calls == [True] * 2 * 17
    assert equal(*results)


@pytest.mark.parametrize("storage", STORAGES)
def test_the_kernels_store_what_the_reference_rounds(storage: str) -> None:
    """Each layer of a block on its own operands, in eighths that have no rounding before the normalisation's."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randint(-8, 9, (4, 3, 9, 7), generator=generator) / 8
    results = []
    backends: tuple[Backend, Backend] = ("native", "reference")
    for backend in backends:
        convolution, norm = nn.Conv2d(3, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5)
        model = nn.Sequential(convolution, norm)
        with torch.no_grad():
            convolution.weight.copy_(torch.randint(-64, 65, (5, 3, 3, 3), generator=generator.manual_seed(6)) / 64)
        sparsify_(model, 0.5, layers=["0"], backend=backend, storage=storage)
        y = blocks.conv_norm_relu(convolution, norm, x.requires_grad_())
        torch.autograd.backward((y * torch.arange(y.numel()).view(y.shape).cos()).sum())
        results.append([y.detach(), *(p.grad for p in model.parameters()), norm.running_mean, norm.running_var])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("batch", [1, 64])
@pytest.mark.parametrize("storage", ["float16", "bfloat16"])
def test_rounding_is_pytorchs_for_every_kind_of_number(storage: str, batch: int, isa: str) -> None:
    """Every number of the type, the ties between them and their neighbours, among them what overflows, and NaN."""
    dtype = layout.STORAGE[storage]
    exact = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).float()
    between = (exact + exact.roll(1)) / 2
    values = torch.cat(
        [exact, between, between * (1 + 2**-20), torch.tensor([65519.99, 65520, 1e30, -1e30, 1e-8, -1e-41])]
    )
    values = values[~(values.abs() > 1e36)] if batch > 1 else values  # the sum of 64 of them stays finite
    expected = values.to(dtype).float()
    finite = expected.isfinite()
    with instruction_set(isa):
        means = torch.cat([means_of_stored(part, storage, batch) for part in torch.split(values, 1 << 13)])
    assert torch.equal(means[finite], expected[finite])
    assert not means[~finite].isfinite().any()


def means_of_stored(values: Tensor, storage: str, batch: int) -> Tensor:
    """The mean of each channel of a convolution that gives `values`, one for each channel and all of its images."""
    count = len(values)
    mean, variance, y = torch.zeros(count), torch.zeros(count), torch.empty(count, 1, 1, batch)
    every = dispatch.native.AtLeast(0.0)
    geometry = kernels.geometry_of((1, 1, 1, batch), (count, 1, 1, 1), (1, 1), (0, 0), (1, 1))
    dispatch.native.ConvNorm(
        geometry, torch.ones(1, 1, 1, batch), values.view(-1, 1, 1, 1).contiguous(), None, every, None, False,
        mean, variance, 1.0, 1.0, None, None, None, False, STORAGES.index(storage), y, 1,
    )  # fmt: skip
    return mean


def test_the_result_does_not_depend_on_the_threads() -> None:
    results = []
    for threads in (1, 2, 3):
        model = small_resnet()
        sparsify_(model, 0.8, storage="float16")
        with torch_threads(threads):
            block = model.layer1[0]
            results.append(step(block, torch.randn(6, 8, 8, 8, generator=torch.Generator().manual_seed(1))))
    assert equal(results[0], results[1])
    assert equal(results[0], results[2])


def hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda *_: None)


def pre_hook(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda *_: None)


def backward_hook(module: nn.Module) -> None:
    module.register_full_backward_hook(lambda *_: None)


def own_forward(module: nn.Module) -> None:
    module.forward = module.forward  # as those do who wrap it


@pytest.mark.parametrize("watch", [hook, pre_hook, backward_hook, own_forward])
@pytest.mark.parametrize("name", ["layer1.0.conv1", "layer1.0.conv2", "layer2.0.bn2"])
def test_who_watches_a_module_sees_it_called(watch: Callable[[nn.Module], None], name: str, calls: list[bool]) -> None:
    model, plain = small_resnet(), small_resnet()
    for each in (model, plain):
        sparsify_(each, 0.8)
    watch(model.get_submodule(name))
    expected = step(plain, images())
    calls.clear()
    actual = step(model, images())
    if name == "layer1.0.conv1":  # the shortcut's gradient is then added behind the convolution's, and not within
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5)
    else:
        assert equal(actual, expected)
    assert calls.count(False) == 1


def test_a_hook_of_all_modules_is_called(calls: list[bool]) -> None:
    model, seen = small_resnet(), []
    sparsify_(model, 0.8)
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    try:
        step(model, images())
    finally:
        handle.remove()
    assert not any(calls)
    assert seen.count(layout.BatchNorm2d) == 20


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same(
    reentrant: bool, told: bool, calls: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`told`: whether torch tells of hooks on saved tensors, which it does not before 2.8."""
    if told and not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"):
        pytest.skip("this torch does not tell")
    if not told:
        monkeypatch.setattr(blocks, "_saved_tensors_hooks", lambda _: None)
    results = []
    for wrap in (False, True):
        model = small_resnet()
        sparsify_(model, 0.8)
        block, x = model.layer1[0], torch.randn(6, 8, 8, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        calls.clear()
        y = checkpoint(block, x, use_reentrant=reentrant) if wrap else block(x)
        if wrap and (told or reentrant):
            assert not any(calls)  # not where the hooks take the tensors, nor without gradients
        torch.autograd.backward(y.square().sum())
        results.append([y.detach(), x.grad, *(p.grad for p in block.parameters())])
    assert equal(*results)


@pytest.mark.parametrize("frozen", ["conv1.weight", "bn1.weight", "bn1.bias", "bn2.weight"])
def test_frozen_parameters_get_no_gradient(frozen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for one in (True, False):
        model = small_resnet()
        sparsify_(model, 0.8)
        block = model.layer2[0]
        block.get_parameter(frozen).requires_grad_(False)
        if not one:
            monkeypatch.setattr(blocks, "_is_one", lambda *_: False)
        results.append(step(block, torch.randn(6, 8, 8, 8, generator=torch.Generator().manual_seed(1))))
        assert block.get_parameter(frozen).grad is None
    assert equal(*results)


def test_the_plain_path_is_taken_where_the_kernels_lack_something(calls: list[bool]) -> None:
    norm = nn.BatchNorm2d(4)
    for convolution in (
        nn.Conv2d(4, 4, 3, groups=2, bias=False),
        nn.Conv2d(4, 4, 3, padding="same", bias=False),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect", bias=False),
    ):
        model = nn.Sequential(convolution, copy.deepcopy(norm))
        sparsify_(model, 0.5, layers=["0"])
        y = blocks.conv_norm_relu(model[0], model[1], torch.randn(3, 4, 5, 5))
        assert y.shape[:2] == (3, 4)
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), norm)
    sparsify_(model, 0.5, layers=["0"])
    with torch.no_grad():
        blocks.conv_norm_relu(model[0], model[1], torch.randn(3, 4, 5, 5))
    model.eval()
    blocks.conv_norm_relu(model[0], model[1], torch.randn(3, 4, 5, 5))
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        blocks.conv_norm_relu(model[0], model[1], torch.randn(3, 4, 5, 5))
    assert not any(calls)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        blocks.conv_norm_relu(model[0], model[1], torch.randn(1, 4, 1, 1))


def test_a_weight_changed_between_the_passes_is_noticed() -> None:
    model = small_resnet()
    sparsify_(model, 0.8)
    y = model(images()).sum()
    with torch.no_grad():
        model.get_parameter("layer1.0.bn1.weight").add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(y)


def test_what_is_kept_goes_with_the_graph() -> None:
    model = small_resnet()
    sparsify_(model, 0.8)
    y = model.layer1(torch.randn(4, 8, 8, 8)).sum()
    torch.autograd.backward(y)
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.backward(y)
