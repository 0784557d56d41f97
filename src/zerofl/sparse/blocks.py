"""Steps of a model that are one operation on the native layers, and are the plain ones on all others."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from zerofl.sparse import layout
from zerofl.sparse.conv_norm import ConvNorm
from zerofl.sparse.dispatch import takes
from zerofl.sparse.kernels import Chosen, batch_first
from zerofl.sparse.layers import SparseConv2d


def fork(convolution: nn.Module, norm: nn.Module, shortcut: nn.Sequential, x: Tensor) -> tuple[Tensor, Tensor]:
    """relu(norm(convolution(x))) and shortcut(x), as a residual block begins.

    Where the shortcut is empty or begins with a 1x1 convolution of the same stride, it needs no more of x than what
    the sparse convolution hands on, and its gradient is added where that of the convolution is computed.
    """
    if not _hands_on(convolution, shortcut):
        return conv_norm_relu(convolution, norm, x), shortcut(x)
    if _is_one(convolution, norm, x, None):
        out, x = _as_one(convolution, norm, x, None)
    else:
        out, x = convolution(x, keep=True)
        out = norm_relu(norm, out)
    for i, module in enumerate(shortcut):
        x = module(x, sampled=True) if i == 0 else module(x)
    return out, x


def _hands_on(convolution: Any, shortcut: nn.Sequential) -> bool:
    """Whether the shortcut needs no more of the input than the convolution hands on, and nobody watches either."""
    if not isinstance(convolution, SparseConv2d):
        return False
    if not (_is_plainly_called(convolution) and _is_plainly_called(shortcut)):
        return False
    if not len(shortcut):
        return convolution.stride == (1, 1)
    first = shortcut[0]
    return (
        isinstance(first, layout.Conv2d)
        and first.is_pointwise
        and first.stride == convolution.stride
        and _is_plainly_called(first)  # a hook would see the samples
    )


def conv_norm_relu(convolution: nn.Module, norm: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """relu(norm(convolution(x)) + residual), in training one operation each way; x and residual [N, C, H, W].

    A residual of another shape may broadcast: then it is two operations.
    Hooks of the two modules are called as ever: then it is two operations.
    """
    if _is_one(convolution, norm, x, residual):
        y: Tensor = _as_one(convolution, norm, x, residual)[0]
        return y
    return norm_relu(norm, convolution(x), residual)


def norm_relu(norm: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """relu(norm(x) + residual), in one pass over memory where `norm` can; x and residual [N, C, H, W]."""
    if isinstance(norm, layout.BatchNorm2d) and _is_plainly_called(norm):
        return norm(x, residual, relu=True)  # type: ignore[no-any-return]
    y = norm(x)
    return F.relu(y if residual is None else y + residual)


def relu_pool(pool: nn.Module, x: Tensor) -> Tensor:
    """pool(relu(x)), in one pass over memory where `pool` can; x [N, C, H, W]."""
    if isinstance(pool, layout.MaxPool2d) and _is_plainly_called(pool):
        return pool(x, relu=True)  # type: ignore[no-any-return]
    return pool(F.relu(x))  # type: ignore[no-any-return]


class Sequential(nn.Sequential):
    """`nn.Sequential` where a convolution, its normalisation and ReLU, if side by side, are one operation in training.

    `sparsify_` makes it of a model's own ones. Hooks of the layers are called as ever: then each layer is called.
    """

    def forward(self, input: Any) -> Any:
        """What the layers make of the input, one after the other."""
        modules = list(self)
        i = 0
        while i < len(modules):
            first, norm, relu = (*modules[i : i + 3], None, None)[:3]
            if type(norm) is layout.BatchNorm2d and _is_one(first, norm, input, None):
                has_relu = type(relu) is nn.ReLU and _is_plainly_called(relu)
                input, _ = _as_one(first, norm, input, None, has_relu)
                i += 2 + has_relu
            else:
                input = modules[i](input)
                i += 1
        return input


def _is_one(convolution: Any, norm: Any, x: Tensor, residual: Tensor | None) -> bool:
    """Whether the kernels have this as one operation, and nobody wants to see what lies between."""
    return (
        type(norm) is layout.BatchNorm2d
        and (type(convolution) is SparseConv2d or (type(convolution) is layout.Conv2d and not convolution.is_pointwise))
        and convolution.groups == 1
        and convolution.padding_mode == "zeros"
        and not isinstance(convolution.padding, str)
        and torch.is_grad_enabled()
        and norm.uses_batch_statistics
        and norm.has_whole_statistics
        and norm.num_features == convolution.out_channels
        and "reference" not in (norm.backend, getattr(convolution, "backend", None))
        and _is_plainly_called(convolution)
        and _is_plainly_called(norm)
        and takes(
            x,
            residual,
            convolution.weight,
            convolution.bias,
            norm.weight,
            norm.bias,
            norm.running_mean,
            norm.running_var,
        )
        and x.dim() == 4
        and layout.takes_shape(convolution, x)
        and _fits(residual, layout.output_shape(convolution, x))
        # Saved tensors that are packed away or recomputed have to be autograd's own.
        and _saved_tensors_hooks(True) is None
    )


def _fits(residual: Tensor | None, shape: tuple[int, int, int, int]) -> bool:
    """Whether an output of this shape has a spread to normalise, and the residual, if any, its shape."""
    images, _, height, width = shape
    return images * height * width > 1 and (residual is None or residual.shape == shape)


# Before torch 2.8 nothing tells of these hooks: then checkpointing gives the same, and keeps more memory.
_saved_tensors_hooks = torch.compiler.disable(  # type: ignore[no-untyped-call]
    getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: None)
)


def _is_plainly_called(module: nn.Module) -> bool:
    """Whether calling the module is calling its class's forward."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
        or _has_any_global_hook()  # type: ignore[no-untyped-call]
    )


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _as_one(
    convolution: Any, norm: layout.BatchNorm2d, x: Tensor, residual: Tensor | None, relu: bool = True
) -> tuple[Tensor, Tensor]:
    """`conv_norm_relu`, or the same without ReLU, and every stride-th position of x."""
    x = batch_first(x.permute(1, 2, 3, 0).contiguous())  # once, and not for each use
    choices = convolution.choices(x)
    y, samples, *chosen = ConvNorm.apply(  # type: ignore[no-untyped-call]
        x,
        convolution.weight,
        convolution.bias,
        norm.weight,
        norm.bias,
        residual,
        (choices[0], choices[1] if convolution.weight.requires_grad else None),
        x.requires_grad,
        (convolution.stride, convolution.padding, convolution.dilation),
        *norm.next_running(),
        norm.eps,
        relu,
        norm.storage if norm.training else "float32",
    )
    convolution.remember(Chosen(*chosen))
    return y, samples
