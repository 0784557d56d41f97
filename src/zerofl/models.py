"""The paper's two models (§4.1, A.6), plain and dense. `sparse_layers` names the layers the paper makes sparse."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zerofl.sparse.blocks import conv_norm_relu, fork, relu_pool
from zerofl.sparse.distribution import DISTRIBUTIONS
from zerofl.sparse.topk import keep_active, top_k_threshold


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, a 1x1 convolution where the shape changes (He et al., 2016)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """[N, in, H, W] -> [N, out, H / stride, W / stride]."""
        out, residual = fork(self.conv1, self.bn1, self.shortcut, x)
        return conv_norm_relu(self.conv2, self.bn2, out, residual)


class ResNet18(nn.Module):
    """ResNet-18 for 32x32 images: a 3x3 stem without pooling. 11,173,962 parameters for 10 classes at width 64.

    Sparse are the 16 3x3 convolutions after the stem; the stem, the 1x1 shortcuts, BatchNorm and `fc` stay dense.
    """

    def __init__(self, classes: int = 10, in_channels: int = 3, width: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        stages = []
        for stage in range(4):
            out_channels = width * 2**stage
            before = out_channels // 2 if stage else width
            first = BasicBlock(before, out_channels, stride=2 if stage else 1)
            stages.append(nn.Sequential(first, BasicBlock(out_channels, out_channels, stride=1)))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.fc = nn.Linear(width * 8, classes)
        self.sparse_layers = [
            f"layer{stage}.{block}.conv{conv}" for stage in (1, 2, 3, 4) for block in (0, 1) for conv in (1, 2)
        ]

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_channels, 32, 32] -> logits [N, classes]."""
        x = conv_norm_relu(self.conv1, self.bn1, x)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


class LeafCNN(nn.Module):
    """LEAF's CNN for 28x28 images (Caldas et al., 2018): 6,603,710 parameters for 62 classes, 97.3 % of them in `fc1`.

    Sparse are both convolutions and the first linear (A.6); the last linear stays dense.
    """

    def __init__(self, classes: int = 62, in_channels: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 32, 5, padding=2)
        self.conv2 = nn.Conv2d(32, 64, 5, padding=2)
        self.pool = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(64 * 7 * 7, 2048)
        self.fc2 = nn.Linear(2048, classes)
        self.sparse_layers = ["conv1", "conv2", "fc1"]

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_channels, 28, 28] -> logits [N, classes]."""
        x = relu_pool(self.pool, self.conv1(x))
        x = relu_pool(self.pool, self.conv2(x))
        return self.fc2(F.relu(self.fc1(x.flatten(1))))  # type: ignore[no-any-return]


def he_(model: nn.Module, sparsity: float, generator: torch.Generator, distribution: str = "uniform") -> None:
    """He's normal initialisation by fan-in for every convolution and linear, with zero bias."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def sparse_he_(model: nn.Module, sparsity: float, generator: torch.Generator, distribution: str = "uniform") -> None:
    """He's, with each sparse layer scaled so that its top-k part alone keeps He's variance 2 / fan_in.

    A layer's signal comes through its top-k weights only. Without the factor the top 5 % of a normal distribution carry
    28 % of its variance, so the signal shrinks in every layer and a network without BatchNorm hardly learns.
    """
    he_(model, sparsity, generator)
    weights = {name: model.get_parameter(f"{name}.weight").detach() for name in model.sparse_layers}  # type: ignore[union-attr]
    for name, k in DISTRIBUTIONS[distribution](weights, sparsity, 0.0).items():
        weight = weights[name]
        top_k = keep_active(weight, top_k_threshold(weight, k))
        variance = 2 / weight[0].numel()
        weight.mul_(math.sqrt(variance * weight.numel()) / top_k.norm())


INITIALIZATIONS: dict[str, Callable[[nn.Module, float, torch.Generator, str], None] | None] = {
    "pytorch": None,  # each layer's own, which its constructor has done
    "he": he_,
    "sparse_he": sparse_he_,
}

# The default initialisation of each model: BatchNorm hides the shrinking signal in ResNet-18, the LEAF CNN needs the
# correction (docs/method.md has both measured).
DEFAULT_INITIALIZATION = {"resnet18": "pytorch", "leaf_cnn": "sparse_he"}


def build_model(model: str, classes: int, in_channels: int, width: int) -> ResNet18 | LeafCNN:
    """The dense model `resnet18` or `leaf_cnn`; `width` is ResNet-18's number of stem channels."""
    if model == "resnet18":
        return ResNet18(classes, in_channels, width)
    if model == "leaf_cnn":
        return LeafCNN(classes, in_channels)
    raise ValueError(f"model = {model!r}: expected one of {sorted(DEFAULT_INITIALIZATION)}")


def initialize_(
    model: nn.Module, initialization: str, sparsity: float, seed: int, distribution: str = "uniform"
) -> None:
    """Give a newly made model its initial weights, a function of `seed`."""
    initialize = INITIALIZATIONS[initialization]
    if initialize is not None:
        initialize(model, sparsity, torch.Generator().manual_seed(seed), distribution)
