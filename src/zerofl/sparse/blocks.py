"""Steps of a model that take one pass over memory on the native layers, and are the plain ones on all others."""

import torch.nn.functional as F
from torch import Tensor, nn

from zerofl.sparse import layout
from zerofl.sparse.layers import SparseConv2d


def fork(convolution: nn.Module, shortcut: nn.Sequential, x: Tensor) -> tuple[Tensor, Tensor]:
    """convolution(x) and shortcut(x), as a residual block has them.

    Where the shortcut is empty or begins with a 1x1 convolution of the same stride, it needs no more of x than what
    the sparse convolution hands on, and its gradient is added where that of the convolution is computed.
    """
    first = shortcut[0] if len(shortcut) else None
    if not isinstance(convolution, SparseConv2d) or not (
        convolution.stride == (1, 1)
        if first is None
        else isinstance(first, layout.Conv2d) and first.is_pointwise and first.stride == convolution.stride
    ):
        return convolution(x), shortcut(x)
    out, x = convolution(x, keep=True)
    for i, module in enumerate(shortcut):
        x = module(x, sampled=True) if i == 0 else module(x)
    return out, x


def norm_relu(norm: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """relu(norm(x) + residual), in one pass over memory where `norm` can; x and residual [N, C, H, W]."""
    if isinstance(norm, layout.BatchNorm2d):
        return norm(x, residual, relu=True)  # type: ignore[no-any-return]
    y = norm(x)
    return F.relu(y if residual is None else y + residual)


def relu_pool(pool: nn.Module, x: Tensor) -> Tensor:
    """pool(relu(x)), in one pass over memory where `pool` can; x [N, C, H, W]."""
    return pool(x, relu=True) if isinstance(pool, layout.MaxPool2d) else pool(F.relu(x))  # type: ignore[no-any-return]
