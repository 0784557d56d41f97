"""The layers about the sparse ones on the native kernels, and whole models on them, against PyTorch."""

import copy
import multiprocessing
import re
import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.sparse.operands import ISAS, instruction_set, integers, torch_threads
from zerofl import SparseConv2d, sparsify_
from zerofl.models import BasicBlock, LeafCNN, ResNet18
from zerofl.sparse import dispatch, kernels, layout
from zerofl.sparse.blocks import norm_relu

seeds = st.integers(0, 2**32)
shapes = st.tuples(st.integers(1, 40), st.integers(1, 5), st.integers(1, 9), st.integers(1, 9)).filter(
    lambda shape: shape[0] * shape[2] * shape[3] > 1
)


def examples(count: int) -> settings:
    return settings(max_examples=count, deadline=None, derandomize=True, database=None)


def laid_out(x: Tensor) -> Iterator[Tensor]:
    """The same numbers in memory of every order."""
    yield x.contiguous()
    yield x.contiguous(memory_format=torch.channels_last)
    yield kernels.batch_first(kernels.batch_innermost(x))
    yield torch.stack([x, x], dim=-1)[..., 0]


@given(shapes, seeds, st.booleans(), st.booleans(), st.booleans(), st.sampled_from([0.1, None]), st.integers(1, 4))
@examples(60)
def test_batch_norm_with_residual_and_relu_is_pytorchs(
    shape: tuple[int, ...], seed: int, affine: bool, residual: bool, relu: bool, momentum: float | None, threads: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    exact = nn.BatchNorm2d(shape[1], affine=affine, momentum=momentum).double()
    for parameter in exact.parameters():
        nn.init.normal_(parameter, generator=generator)
    x, r, grad = (torch.randn(shape, generator=generator) for _ in range(3))
    for isa in ISAS:
        layer, expected_layer = layout.BatchNorm2d(shape[1], affine=affine, momentum=momentum), copy.deepcopy(exact)
        layer.load_state_dict(exact.state_dict())
        ours, theirs = (
            [t.clone().requires_grad_() for t in (x.to(dtype), r.to(dtype))] for dtype in (x.dtype, torch.double)
        )
        with instruction_set(isa), torch_threads(threads):
            y = layer(ours[0], ours[1] if residual else None, relu)
            y.backward(grad)
        expected = expected_layer(theirs[0]) + (theirs[1] if residual else 0)
        # Which side of zero a number is on that is nearly zero is a matter of rounding.
        expected.backward(grad.double() * (y > 0) if relu else grad.double())
        # A channel whose numbers are nearly equal is scaled up, and the rounding of their mean with it.
        spread = (x.double().var((0, 2, 3), correction=0, keepdim=True) + exact.eps).sqrt()
        torch.testing.assert_close(
            (y * spread).double(), (F.relu(expected) if relu else expected) * spread, rtol=1e-5, atol=2e-5
        )
        for name, ours_, theirs_ in [
            ("running_mean", layer.running_mean, expected_layer.running_mean),
            ("running_var", layer.running_var, expected_layer.running_var),
            *((name, p.grad, expected_layer.get_parameter(name).grad) for name, p in layer.named_parameters()),
            *([("residual", ours[1].grad, theirs[1].grad)] if residual else []),
            ("x", gradient(ours[0]) * spread**2, gradient(theirs[0]) * spread**2),
        ]:
            assert ours_ is not None
            assert theirs_ is not None
            scale = (1 / spread.flatten()).clamp(min=1) if name == "weight" else torch.ones(())
            torch.testing.assert_close(
                ours_ / scale, theirs_ / scale, rtol=1e-4, atol=2e-4, check_dtype=False, msg=name
            )
        assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", [(32, 1, 8, 8), (64, 1, 32, 32), (3, 1, 5, 7)])
@pytest.mark.parametrize("level", [0.1, 3.3, 100.3, 10000.1])
def test_a_channel_of_equal_numbers_has_no_spread(isa: str, shape: tuple[int, ...], level: float) -> None:
    layer = layout.BatchNorm2d(1)
    with instruction_set(isa):
        y = layer(torch.full(shape, level))
    assert not y.any()
    assert layer.running_mean is not None
    assert layer.running_var is not None
    torch.testing.assert_close(layer.running_mean, torch.tensor([0.1 * level]), rtol=1e-7, atol=0)
    assert layer.running_var.item() == 1 + torch.tensor(0.1) * (0 - 1)  # moved a tenth of the way from 1 to 0


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("level", [3.3, 100.3, 10000.1])
@pytest.mark.parametrize("spread", [1e-6, 1e-4, 1e-2])
def test_a_narrow_channel_is_normalised_as_exactly_as_its_mean_can_be_held(
    isa: str, level: float, spread: float
) -> None:
    x = level * (1 + spread * torch.randn(20, 1, 24, 24, generator=torch.Generator().manual_seed(0)))
    exact, layer = nn.BatchNorm2d(1, momentum=1.0).double(), layout.BatchNorm2d(1, momentum=1.0)
    assert exact.running_var is not None
    assert layer.running_var is not None
    exact.running_var.zero_(), layer.running_var.zero_()  # else 1 + (variance - 1) would round it
    expected = exact(x.double())
    with instruction_set(isa):
        y = layer(x)
    eps = torch.finfo(torch.float32).eps
    scale = 1 / (x.double().var(correction=0) + layer.eps).sqrt().item()
    torch.testing.assert_close(y.double(), expected, rtol=16 * eps, atol=level * eps * scale + 16 * eps)
    torch.testing.assert_close(layer.running_mean, exact.running_mean, rtol=eps, atol=0, check_dtype=False)
    torch.testing.assert_close(layer.running_var, exact.running_var, rtol=1e-5, atol=0, check_dtype=False)


@given(shapes, st.integers(1, 4), st.booleans(), seeds, st.integers(1, 4))
@examples(60)
def test_pooling_is_pytorchs_ties_included(
    shape: tuple[int, ...], size: int, relu: bool, seed: int, threads: int
) -> None:
    size = min(size, *shape[2:])
    generator = torch.Generator().manual_seed(seed)
    x = integers(shape, generator, largest=2)
    grad = integers((*shape[:2], shape[2] // size, shape[3] // size), generator)
    expected_x = x.clone().requires_grad_()
    expected = F.max_pool2d(F.relu(expected_x) if relu else expected_x, size)
    torch.autograd.backward(expected, grad)
    for isa in ISAS:
        ours = x.clone().requires_grad_()
        with instruction_set(isa), torch_threads(threads):
            y: Tensor = layout.MaxPool2d(size)(ours, relu)
            torch.autograd.backward(y, grad)
        torch.testing.assert_close(y, expected, rtol=0, atol=0)
        torch.testing.assert_close(ours.grad, expected_x.grad, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("dense", "shape"),
    [
        (nn.Conv2d(4, 6, 3), (2, 3, 5, 5)),
        (nn.Conv2d(4, 6, 1), (2, 3, 5, 5)),
        (nn.Conv2d(4, 6, 3), (2, 4, 2, 5)),
        (nn.BatchNorm2d(4), (2, 3, 5, 5)),
        (nn.MaxPool2d(2), (2, 3, 5, 1)),
    ],
)
def test_an_input_of_another_shape_is_refused_in_pytorchs_words(dense: nn.Module, shape: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError) as expected:
        dense(torch.ones(shape))
    ours = copy.deepcopy(dense)
    ours.__class__ = layout.INNERMOST[type(dense)]
    with pytest.raises(RuntimeError) as actual:
        ours(torch.ones(shape))
    assert str(actual.value) == str(expected.value)


def test_what_follows_a_not_a_number_is_one() -> None:
    x = torch.randn(4, 3, 6, 6)
    x[1, 2, 3, 4] = torch.nan
    y = layout.BatchNorm2d(3)(x, None, True)
    assert y[:, 2].isnan().all()
    assert y[:, :2].isfinite().all()
    assert layout.MaxPool2d(2)(x, True)[1, 2, 1, 2].isnan()


@pytest.mark.parametrize("stride", [1, 2])
def test_a_block_on_the_kernels_is_the_references_in_any_layout(stride: int) -> None:
    """Both of whose branches, and their gradients' sum, meet in one kernel."""
    torch.manual_seed(0)
    block = BasicBlock(16, 16 * stride, stride)
    blocks = {backend: copy.deepcopy(block) for backend in ("native", "reference")}
    for backend, each in blocks.items():
        sparsify_(each, 0.8, layers=["conv1", "conv2"], backend=backend)  # type: ignore[arg-type]
    x = torch.randn(6, 16, 9, 9)
    for input in laid_out(x):
        results = []
        for each in blocks.values():
            each.zero_grad()
            leaf = input.clone(memory_format=torch.preserve_format).requires_grad_()
            y = each(leaf)
            y.square().sum().backward()
            results.append([y, leaf.grad, *(p.grad for p in each.parameters())])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


@pytest.mark.parametrize("topk_period", [1, 3])
def test_ten_steps_of_resnet18_follow_the_references_losses(topk_period: int) -> None:
    """As far as rounding lets them: it turns a ReLU or top-k here and there, and training magnifies that.

    The reference's own losses in float32 and float64 differ by 1 % here, and by more with fewer images.
    """
    losses = {}
    for backend in ("native", "reference"):
        model = small_resnet()
        sparsify_(model, 0.9, backend=backend, topk_period=topk_period)
        losses[backend] = steps(model, 10, count=64)
    torch.testing.assert_close(losses["native"], losses["reference"], rtol=3e-2, atol=0)
    assert losses["native"][-1] < 0.9 * losses["native"][0]


def test_training_is_bitwise_the_same_on_any_number_of_threads() -> None:
    states = []
    for threads in (1, 2, 3, 4):
        model = small_resnet()
        sparsify_(model, 0.9, backend="native")
        # The dense products of the first and last layer and of the shortcuts are PyTorch's, whose sums depend on it.
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("shortcut" not in name and not name.startswith("fc"))
        with torch_threads(threads):
            features = model.layer1(norm_relu(model.bn1, model.conv1(images())))
            features.square().mean().backward()
        states.append([features, *(p.grad for p in model.layer1.parameters())])
    for state in states[1:]:
        for ours, first in zip(state, states[0], strict=True):
            torch.testing.assert_close(ours, first, rtol=0, atol=0)


def test_a_forked_process_trains_as_its_parent_does() -> None:
    model = small_resnet()
    sparsify_(model, 0.9, backend="native")
    with torch_threads(2):
        steps(model, 1)  # the parent's threads are there
        context = multiprocessing.get_context("fork")
        receiving, sending = context.Pipe(duplex=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = context.Process(target=lambda: sending.send(features_in_a_fork(model)))
            child.start()
        assert receiving.poll(60), "the child hangs"
        child.join(60)
        assert receiving.recv() == features_in_a_fork(model)


def features_in_a_fork(model: ResNet18) -> list[float]:
    """Of sparse layers alone: PyTorch's own threads are not safe after a fork."""
    layer = model.layer1[0].conv1
    assert isinstance(layer, SparseConv2d)
    x = torch.linspace(-1, 1, 8 * 64).view(8, 8, 2, 4)
    values: list[float] = layer(x).detach().flatten().tolist()
    return values


def test_without_kernels_the_reference_serves_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "UNAVAILABLE", "no compiler")
    model, expected = small_resnet(), small_resnet()
    with pytest.warns(UserWarning, match=r"native kernels are not installed \(no compiler\)") as caught:
        sparsify_(model, 0.9)
    assert len(caught) == 1
    # "Reinstall zerofl" would be somebody else's package.
    assert re.search(r"from its sources \(pip install \..*C\+\+17 compiler", str(caught[0].message))
    sparsify_(expected, 0.9, backend="reference")
    torch.testing.assert_close(model(images()), expected(images()), rtol=0, atol=0)
    assert not any(type(module).__module__ == layout.__name__ for module in model.modules())
    with pytest.raises(ValueError, match="no compiler"):
        sparsify_(small_resnet(), 0.9, backend="native")


@pytest.mark.parametrize("model", [ResNet18(width=8), LeafCNN()])
def test_evaluation_on_the_kernels_is_the_references(model: ResNet18 | LeafCNN) -> None:
    x = torch.rand(5, 3, 32, 32) if isinstance(model, ResNet18) else torch.rand(5, 1, 28, 28)
    outputs = []
    for backend in ("native", "reference"):
        each = copy.deepcopy(model)
        sparsify_(each, 0.9, backend=backend)
        with torch.no_grad():
            outputs.append(each.eval()(x))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


def gradient(x: Tensor) -> Tensor:
    assert x.grad is not None
    return x.grad


def small_resnet() -> ResNet18:
    torch.manual_seed(0)
    return ResNet18(width=8)


def images(count: int = 12) -> Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def steps(model: ResNet18, repetitions: int, count: int = 12) -> Tensor:
    """The losses of steps on the same images, as learning them shows."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(repetitions):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images(count)), torch.arange(count) % 10)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)
