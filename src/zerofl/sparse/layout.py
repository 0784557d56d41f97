"""Dense layers that stay in the native kernels' batch-innermost layout: what a sparse layer's neighbours become.

`sparsify_` turns the plain `nn.Conv2d`, `nn.BatchNorm2d` and `nn.MaxPool2d` of a model into these in place. Where the
kernels cannot work (another device or dtype), they are exactly PyTorch's.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zerofl.sparse import dense_kernels, kernels
from zerofl.sparse.dispatch import native, takes


class Conv2d(nn.Conv2d):
    """A dense convolution: a matrix product for a 1x1 kernel, else the sparse kernels with every weight active."""

    @property
    def is_pointwise(self) -> bool:
        """Whether each output position depends on one input position only."""
        return self.kernel_size == (1, 1) and self.padding == (0, 0) and self.groups == 1

    def forward(self, input: Tensor, sampled: bool = False) -> Tensor:
        """Input [N, C, H, W] -> output [N, O, H', W']; `sampled`: only every stride-th position is there."""
        if (
            self.groups != 1
            or self.padding_mode != "zeros"
            or isinstance(self.padding, str)
            or not takes_shape(self, input)
            or input.dim() != 4
            or not takes(input, self.weight, self.bias)
        ):
            if sampled:
                return F.conv2d(input, self.weight, self.bias)
            return super().forward(input)
        if self.is_pointwise:
            return _pointwise(input, self.weight, self.bias, (1, 1) if sampled else self.stride)
        return _convolve(input, self.weight, self.bias, self.stride, self.padding, self.dilation)  # type: ignore[no-any-return]

    # What `zerofl.sparse.blocks` asks of a convolution.

    def choices(self, input: Tensor) -> tuple[Any, Any]:
        """All entries of the weight and of the input."""
        return native.AtLeast(0.0), native.AtLeast(0.0)

    def remember(self, chosen: kernels.Chosen) -> None:
        """Nothing: what is active does not change."""


STORAGE: dict[str, torch.dtype] = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""How what a normalisation reads in training can be stored, by name."""


class BatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation, and in the same pass over memory a residual's addition and ReLU.

    `storage` names the type in which the input is kept for the backward pass. With 16 bits the input is rounded to it
    first, so that both passes see the same numbers; all arithmetic is float32. It acts in training.
    """

    storage: str = "float32"
    backend: str = "auto"  # "reference": PyTorch's own operations

    def forward(self, input: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """relu(norm(input) + residual): all [N, C, H, W], or a residual of another shape that broadcasts with it."""
        if residual is not None and residual.shape != input.shape:
            y = self.forward(input) + residual
            return F.relu(y) if relu else y
        fast = input.dim() == 4 and input.shape[1] == self.num_features and self.backend != "reference"
        fast = fast and self.has_whole_statistics
        fast = fast and takes(input, residual, self.weight, self.bias, self.running_mean, self.running_var)
        if not fast or (not self.uses_batch_statistics and torch.is_grad_enabled()):
            if self.training and self.storage != "float32" and input.dtype == torch.float32:
                input = Rounded.apply(input, STORAGE[self.storage])  # type: ignore[no-untyped-call]
            y = super().forward(input)
            y = y if residual is None else y + residual
            return F.relu(y) if relu else y
        return self._native(input, residual, relu)  # type: ignore[no-any-return]

    @property
    def has_whole_statistics(self) -> bool:
        """Whether the running statistics, which the kernels write, lie in memory without gaps."""
        return all(x is None or x.is_contiguous() for x in (self.running_mean, self.running_var))

    @property
    def uses_batch_statistics(self) -> bool:
        """Whether a forward pass normalises by the batch's own mean and variance."""
        return self.training or self.running_mean is None

    def next_running(self) -> tuple[tuple[Tensor | None, Tensor | None], float]:
        """Count a batch; returns the running statistics, if any is to move, and by how much."""
        if not (self.training and self.track_running_stats) or self.running_mean is None:
            return (None, None), 0.0
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = 1 / self.num_batches_tracked.item()
        return (self.running_mean, self.running_var), momentum

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _native(self, input: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
        self._check_input_dim(input)
        if not self.uses_batch_statistics:
            assert self.running_mean is not None
            assert self.running_var is not None
            return dense_kernels.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, residual, self.eps, relu
            )
        count = input.numel() // input.shape[1]
        if count == 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.size()}")
        storage = STORAGE[self.storage] if self.training else torch.float32
        return dense_kernels.BatchNorm2d.apply(  # type: ignore[no-any-return,no-untyped-call]
            input, self.weight, self.bias, residual, *self.next_running(), self.eps, relu, storage
        )


class Rounded(torch.autograd.Function):
    """The input as it is after having been stored in another type; its gradient passes unchanged."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, storage: torch.dtype) -> Tensor:
        return input.to(storage).to(input.dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return grad_output, None


class MaxPool2d(nn.MaxPool2d):
    """The maximum over squares side by side, of relu(input) if asked for."""

    def forward(self, input: Tensor, relu: bool = False) -> Tensor:
        """Input [N, C, H, W] -> [N, C, H / size, W / size]."""
        if input.dim() == 4 and min(input.shape[2:]) >= self.kernel_size and takes(input):  # type: ignore[operator]
            return _max_pool(input, self.kernel_size, relu)  # type: ignore[no-any-return]
        return super().forward(F.relu(input) if relu else input)  # type: ignore[no-any-return]


def output_shape(convolution: nn.Conv2d, input: Tensor) -> tuple[int, int, int, int]:
    """[N, O, H', W'] of the convolution's output; the input [N, C, H, W] is one it takes."""
    left, right, top, bottom = convolution._reversed_padding_repeated_twice
    height, width = (
        (input.shape[2 + i] + padding - convolution.dilation[i] * (convolution.kernel_size[i] - 1) - 1)
        // convolution.stride[i]
        + 1
        for i, padding in ((0, top + bottom), (1, left + right))
    )
    return input.shape[0], convolution.out_channels, height, width


def takes_shape(convolution: nn.Conv2d, input: Any) -> bool:
    """Whether `input`, a tensor [N, C, H, W] or [C, H, W], has the convolution's channels, and room for its kernel."""
    if not isinstance(input, Tensor) or input.dim() not in (3, 4) or input.numel() == 0:
        return False
    left, right, top, bottom = convolution._reversed_padding_repeated_twice
    channels, height, width = input.shape[-3:]
    (kernel_height, kernel_width), (row, column) = convolution.kernel_size, convolution.dilation
    return (
        channels == convolution.in_channels
        and height + top + bottom > row * (kernel_height - 1)
        and width + left + right > column * (kernel_width - 1)
    )


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _convolve(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    input = kernels.batch_first(input.permute(1, 2, 3, 0).contiguous())
    every = native.AtLeast(0.0)
    output, *_ = kernels.conv2d(input, weight, bias, every, every, stride, padding, dilation)
    return output


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _max_pool(input: Tensor, size: int, relu: bool) -> Tensor:
    return dense_kernels.MaxPool2d.apply(input, size, relu)  # type: ignore[no-any-return,no-untyped-call]


def _pointwise(input: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int]) -> Tensor:
    """A 1x1 convolution as a product of [O, C] and [C, H' W' N], which PyTorch differentiates."""
    x = input.permute(1, 2, 3, 0)[:, :: stride[0], :: stride[1]]
    y = weight.flatten(1) @ x.reshape(x.shape[0], -1)
    if bias is not None:
        y = y + bias[:, None]
    return y.view(-1, *x.shape[1:]).permute(3, 0, 1, 2)


# By exact type: a subclass has a forward of its own.
INNERMOST: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: Conv2d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.MaxPool2d: MaxPool2d,
}


def can_be_innermost(module: nn.Module) -> bool:
    """Whether `module` is one of PyTorch's layers that has its double here."""
    if type(module) is nn.MaxPool2d:
        size, stride = module.kernel_size, module.stride
        plain = (module.padding, module.dilation, module.return_indices, module.ceil_mode) == (0, 1, False, False)
        return isinstance(size, int) and size == stride and 1 <= size <= 15 and plain
    return type(module) in INNERMOST
