"""The native kernels in models as people write them: in-place operations, other defaults, graphs used twice."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zerofl
from zerofl.models import ResNet18
from zerofl.sparse import blocks, dispatch, layout
from zerofl.sparse.layers import SparseConv2d

pytestmark = pytest.mark.skipif(dispatch.UNAVAILABLE is not None, reason="no native kernels")


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x), inplace=True)
        y: Tensor = self.bn(self.conv(x))
        y += x
        return F.relu(y, inplace=True).mean((2, 3))


def tail(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), *layers, nn.Flatten(), nn.LazyLinear(4))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "conv": lambda: tail(nn.ReLU(inplace=True)),
    "bn": lambda: tail(nn.BatchNorm2d(8), nn.ReLU(inplace=True)),
    "pool": lambda: tail(nn.MaxPool2d(2), nn.ReLU(inplace=True), nn.Dropout(0.0, inplace=True)),
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 12, 20), nn.ReLU(inplace=True), nn.Linear(20, 4)),
    "residual": Residual,
}


@pytest.mark.parametrize("name", MODELS)
def test_a_layers_output_may_be_changed_in_place(name: str) -> None:
    x = torch.randn(20, 3, 12, 12)
    torch.manual_seed(0)
    model = MODELS[name]()
    model(x)  # lazy layers
    state = model.state_dict()
    gradients = []
    for backend in ("native", "reference"):
        torch.manual_seed(0)
        model = MODELS[name]()
        model(x)
        model.load_state_dict(state)
        layer = next(n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
        layers = ["stem", "conv"] if name == "residual" else [layer]
        zerofl.sparsify_(model, 0.8, layers=layers, backend=backend)
        model(x).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


def test_the_operands_go_with_the_graph() -> None:
    layer = nn.Sequential(nn.Linear(30, 20))
    zerofl.sparsify_(layer, 0.5, layers=["0"], backend="native")
    y = layer(torch.randn(4, 30)).sum()
    y.backward(retain_graph=True)
    y.backward()
    with pytest.raises(RuntimeError, match="backward through a sparse layer a second time"):
        y.backward()


def test_other_defaults_of_type_and_device_change_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.MaxPool2d(2))
    zerofl.sparsify_(model, 0.5, layers=["0"], backend="native")
    x = torch.randn(2, 3, 10, 10)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            y = model(x)
            y.sum().backward()
    finally:
        torch.set_default_dtype(before)
    assert (y.dtype, y.device.type) == (torch.float32, "cpu")


def test_a_norm_may_have_parameters_with_gaps() -> None:
    norm = nn.BatchNorm2d(8)
    norm.weight, norm.bias = nn.Parameter(torch.ones(1).expand(8)), nn.Parameter(torch.zeros(16)[::2])
    expected = norm(x := torch.randn(4, 8, 5, 5))
    norm.__class__ = layout.BatchNorm2d
    torch.testing.assert_close(norm(x), expected)
    torch.testing.assert_close(norm.eval()(x).shape, expected.shape)


def test_a_norm_may_have_statistics_with_gaps() -> None:
    plain, ours = (nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)) for _ in range(2))
    ours.load_state_dict(plain.state_dict())
    for model in (plain, ours):
        model[1].running_mean, model[1].running_var = torch.zeros(16)[::2], torch.ones(16)[::2]
    zerofl.sparsify_(ours, 0.0, layers=["0"], backend="native")
    x = torch.randn(4, 3, 6, 6)
    for is_training in (False, True):
        torch.testing.assert_close(ours.train(is_training)(x), plain.train(is_training)(x))
    torch.testing.assert_close(blocks.conv_norm_relu(ours[0], ours[1], x), plain(x).relu())
    torch.testing.assert_close(ours[1].running_mean, plain[1].running_mean)


def test_a_hook_of_a_shortcut_sees_the_whole_input() -> None:
    model = ResNet18(width=4)
    zerofl.sparsify_(model, 0.5)
    seen = []
    hook = lambda module, inputs: seen.append(inputs[0].shape)  # noqa: E731
    model.get_submodule("layer2.0.shortcut.0").register_forward_pre_hook(hook)
    model(torch.randn(2, 3, 16, 16))
    assert seen == [(2, 4, 16, 16)]


def test_a_pool_larger_than_its_input_is_refused_as_ever() -> None:
    pool = nn.MaxPool2d(2)
    pool.__class__ = layout.MaxPool2d
    with pytest.raises(RuntimeError, match="Output size is too small"):
        pool(torch.randn(1, 2, 1, 1))


def test_the_reference_is_the_reference_also_after_the_kernels() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.MaxPool2d(2))
    zerofl.sparsify_(model, 0.5, layers=["2"])
    assert type(model[0]) is layout.Conv2d
    zerofl.sparsify_(model, 0.5, layers=["2"], backend="reference")
    assert [type(m) for m in model] == [nn.Conv2d, nn.BatchNorm2d, SparseConv2d, nn.MaxPool2d]


@pytest.mark.parametrize("is_training", [True, False])
def test_hooks_see_what_they_see_of_the_dense_model(is_training: bool) -> None:
    """The shapes that come and go, and the same values, whatever would be one operation."""

    def watched(model: nn.Module) -> dict[str, tuple[torch.Size, Tensor]]:
        seen = {}
        for name, module in model.named_modules():
            hook = lambda _, inputs, output, name=name: seen.update({name: (inputs[0].shape, output.detach().clone())})  # noqa: E731
            handle = module.register_forward_hook(hook)
            model.train(is_training)(x)
            handle.remove()
        return seen

    x = torch.randn(2, 3, 16, 16)
    ours = ResNet18(width=4)
    plain = copy.deepcopy(ours)
    zerofl.sparsify_(ours, 0.0)
    expected, seen = watched(plain), watched(ours)
    assert expected.keys() == seen.keys()
    for name, (shape, output) in expected.items():
        assert (name, seen[name][0]) == (name, shape)
        torch.testing.assert_close(seen[name][1], output, rtol=1e-3, atol=1e-4, msg=name)
