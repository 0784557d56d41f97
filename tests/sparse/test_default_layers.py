"""Which layers `sparsify_` takes where nobody names them, on small models of the usual kinds."""

import copy
import logging
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zerofl import sparsify_
from zerofl.flower.adopt_client import sparse_by_shape
from zerofl.models import LeafCNN, ResNet18
from zerofl.sparse.default_layers import default_by_shape
from zerofl.sparse.sparsify import sparse_layers


def head(channels: int, classes: int = 10) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]


def depthwise(channels: int, size: int = 3) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, size, padding=size // 2, groups=channels)


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, channels // 4, 1), nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True)))))


class ConvNeXtBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = depthwise(channels, 7)
        self.norm, self.wide, self.narrow = (
            nn.LayerNorm(channels), nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return torch.add(x, self.narrow(F.relu(self.wide(y))).permute(0, 3, 1, 2))


class Bottleneck(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.narrow, self.conv, self.wide = (
            nn.Conv2d(channels, channels // 4, 1), nn.Conv2d(channels // 4, channels // 4, 3, padding=1),
            nn.Conv2d(channels // 4, channels, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, self.wide(self.conv(self.narrow(x))))


# Each with the layers that are to be sparse, and whether they have less than half of the parameters.
MODELS: dict[str, tuple[Callable[[], nn.Module], list[str], bool]] = {
    "mobilenet v1": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), depthwise(16), nn.Conv2d(16, 32, 1), nn.BatchNorm2d(32),
            depthwise(32), nn.Conv2d(32, 64, 1), *head(64),
        ),
        ["2", "5"], False,
    ),
    "mobilenet v1 with a convolution as classifier": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), depthwise(16), nn.Conv2d(16, 64, 1), nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(64, 5, 1), nn.Flatten(),
        ),
        ["2"], False,
    ),
    "mobilenet v2": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 96, 1), depthwise(96), nn.Conv2d(96, 16, 1), *head(16),
        ),
        ["1", "3"], False,
    ),
    "mobilenet v3 and efficientnet": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 64, 1), depthwise(64, 5), SqueezeExcite(64),
            nn.Conv2d(64, 24, 1), *head(24),
        ),
        ["1", "3.reduce", "3.expand", "4"], False,
    ),
    "efficientnet v2": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3), nn.Conv2d(32, 16, 1), nn.Conv2d(16, 32, 1),
            depthwise(32), nn.Conv2d(32, 16, 1), *head(16),
        ),
        ["1", "2", "3", "5"], False,
    ),
    "convnext": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 16, 4, 4), ConvNeXtBlock(16), nn.Conv2d(16, 32, 2, 2), ConvNeXtBlock(32), *head(32)
        ),
        ["1.wide", "1.narrow", "2", "3.wide", "3.narrow"], False,
    ),
    "shufflenet": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 24, 3), nn.Conv2d(24, 24, 1, groups=3), nn.ChannelShuffle(3), depthwise(24),
            nn.Conv2d(24, 192, 1, groups=3), *head(192, 2),
        ),
        ["1", "4"], False,
    ),
    "resnet with bottlenecks": (
        lambda: nn.Sequential(nn.Conv2d(3, 64, 3), Bottleneck(64), Bottleneck(64), *head(64)),
        ["1.conv", "2.conv"], True,
    ),
    "without linear layers": (
        lambda: nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 5, 1)),
        ["1"], False,
    ),
    "depthwise layers that are wider": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3, groups=16), nn.Conv2d(32, 64, 1), *head(64)
        ),
        ["2"], False,
    ),
    "grey images": (
        lambda: nn.Sequential(nn.Conv2d(1, 8, 5), nn.Conv2d(8, 16, 5), nn.Conv2d(16, 16, 1), *head(16)),
        ["1"], False,
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:sparsify_ took")
@pytest.mark.parametrize("name", MODELS)
def test_the_default_is_the_same_by_layers_and_by_shapes(name: str) -> None:
    make, expected, _ = MODELS[name]
    model = make()
    assert sparsify_(model, 0.5) == expected
    assert sparse_by_shape(model.state_dict()) == [f"{name}.weight" for name, _ in sparse_layers(model)]
    assert sparsify_(model, 0.8) == expected  # also of what is sparse already
    x = torch.randn(2, 1 if name == "grey images" else 3, 28, 28)
    model(x).square().mean().backward()


@pytest.mark.parametrize("name", MODELS)
def test_a_default_that_takes_less_than_half_warns(name: str, recwarn: pytest.WarningsRecorder) -> None:
    make, expected, warns = MODELS[name]
    model = make()
    sparse = sum(model.get_parameter(f"{layer}.weight").numel() for layer in expected)
    total = sum(p.numel() for p in model.parameters())
    assert (sparse / total < 0.5) == warns
    sparsify_(copy.deepcopy(model), 0.9, layers=expected, backend="reference")
    assert not recwarn.list
    if warns:
        with pytest.warns(
            UserWarning, match=rf"took {100 * sparse / total:.1f} % of the .*\(in {', '.join(expected)}\)"
        ):
            sparsify_(model, 0.9, backend="reference")
    else:
        sparsify_(model, 0.9, backend="reference")
        assert not recwarn.list


@pytest.mark.parametrize("model", [ResNet18(), LeafCNN(), ResNet18(width=1)])
def test_the_papers_models_do_not_warn(model: ResNet18 | LeafCNN, caplog: pytest.LogCaptureFixture) -> None:
    sparse = sum(model.get_parameter(f"{name}.weight").numel() for name in model.sparse_layers)
    with warnings.catch_warnings(), caplog.at_level(logging.INFO, "zerofl"):
        warnings.simplefilter("error")
        sparsify_(model, 0.9, backend="reference")
    assert f"sparsify_: {100 * sparse / sum(p.numel() for p in model.parameters()):.1f} %" in caplog.text


def test_depthwise_filters_are_told_by_the_one_channel_that_they_read() -> None:
    shapes = {"stem": (8, 3, 3, 3), "in groups": (8, 4, 3, 3), "pointwise": (8, 8, 1, 1), "fc": (2, 8)}
    assert default_by_shape(shapes) == ["in groups"]
    assert default_by_shape(shapes | {"in groups": (8, 1, 3, 3)}) == ["pointwise"]
    assert default_by_shape(shapes | {"in groups": (8, 1, 1, 1)}) == []  # a scale for each channel separates nothing


class LanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.mix = nn.Embedding(30, 8), nn.Linear(8, 8)
        self.decoder, self.norm = nn.Linear(8, 30, bias=False), nn.Linear(30, 30)
        self.decoder.weight = self.encoder.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.norm(self.decoder(self.mix(self.encoder(tokens))))  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:sparsify_ took")
def test_a_layer_whose_weight_another_module_uses_stays_dense_by_default() -> None:
    assert sparsify_(LanguageModel(), 0.5) == ["mix"]
    twins = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    twins[2].weight = twins[0].weight
    assert sparsify_(twins, 0.5) == ["1"]


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_named_layer_takes_the_top_k_of_the_weight_it_shares(backend: str) -> None:
    torch.manual_seed(0)
    model = LanguageModel()
    untied = copy.deepcopy(model)
    untied.decoder.weight = nn.Parameter(untied.encoder.weight.detach().clone())
    tokens = torch.randint(0, 30, (2, 5))
    outputs = []
    for each in (model, untied):
        assert sparsify_(each, 0.75, layers=["decoder"], backend=backend) == ["decoder"]  # type: ignore[arg-type]
        outputs.append(each(tokens))
        outputs[-1].square().sum().backward()
    assert model.decoder.weight is model.encoder.weight
    torch.testing.assert_close(outputs[0], outputs[1])
    gradients = [layer.weight.grad for layer in (model.encoder, untied.encoder, untied.decoder)]
    assert gradients[1] is not None
    assert gradients[2] is not None
    torch.testing.assert_close(gradients[0], gradients[1] + gradients[2])
    assert list(model.state_dict()) == list(LanguageModel().state_dict())
