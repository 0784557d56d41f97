"""The dense layers between the sparse ones on the native kernels: batch normalisation, residual, ReLU and pooling."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from zerofl.sparse.dispatch import native
from zerofl.sparse.kernels import batch_first, batch_innermost, empty, result, small


class BatchNorm2d(torch.autograd.Function):
    """relu(batch_norm(input) + residual) with the batch's own statistics; residual and ReLU are optional.

    Moves the running statistics, if given, towards the batch's by `momentum`. Reads and keeps the input as `storage`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        running: tuple[Tensor | None, Tensor | None],
        momentum: float,
        eps: float,
        relu: bool,
        storage: torch.dtype,
    ) -> Tensor:
        x = batch_innermost(input).to(storage)
        mean, variance = small(x.shape[:1]), small(x.shape[:1])
        weight, bias = (None if t is None else t.detach().contiguous() for t in (weight, bias))
        needs_grad = any(ctx.needs_input_grad)
        positive = small((x.shape[0], -(-x[0].numel() // 8)), torch.uint8) if relu and needs_grad else None
        y = _normalise(
            x,
            residual,
            of_batch=True,
            mean=mean,
            variance=variance,
            running_mean=running[0],
            running_variance=running[1],
            momentum=momentum,
            epsilon=eps,
            weight=weight,
            bias=bias,
            relu=relu,
            positive=positive,
        )
        if needs_grad:
            ctx.save_for_backward(x, positive, mean, variance, weight)
        ctx.eps = eps
        return result(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, positive, mean, variance, weight = ctx.saved_tensors
        grad_y, grad_x = batch_innermost(grad_output), empty(x.shape)
        grad_weight, grad_bias = torch.empty_like(mean), torch.empty_like(mean)
        grad_residual = empty(x.shape) if ctx.needs_input_grad[3] else None
        native.batch_norm_backward(
            grad_y=grad_y,
            x=x,
            positive=positive,
            mean=mean,
            variance=variance,
            epsilon=ctx.eps,
            weight=weight,
            grad_x=grad_x,
            grad_weight=grad_weight,
            grad_bias=grad_bias,
            grad_residual=grad_residual,
            threads=torch.get_num_threads(),
        )
        return (
            batch_first(grad_x),
            grad_weight if ctx.needs_input_grad[1] else None,
            grad_bias if ctx.needs_input_grad[2] else None,
            None if grad_residual is None else batch_first(grad_residual),
            *[None] * 5,
        )


def batch_norm(
    input: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    relu: bool,
) -> Tensor:
    """relu(batch_norm(input) + residual) with given statistics, as in evaluation; not differentiable."""
    x = batch_innermost(input)
    weight, bias = (None if t is None else t.detach().contiguous() for t in (weight, bias))
    y = _normalise(
        x,
        residual,
        of_batch=False,
        mean=mean,
        variance=variance,
        running_mean=None,
        running_variance=None,
        momentum=0.0,
        epsilon=eps,
        weight=weight,
        bias=bias,
        relu=relu,
        positive=None,
    )
    return batch_first(y)


def _normalise(x: Tensor, residual: Tensor | None, **rest: Any) -> Tensor:
    """`_native.batch_norm` of x [C, H, W, N] and the arguments it has besides; the result is of x's shape."""
    y, residual = empty(x.shape), None if residual is None else batch_innermost(residual)
    native.batch_norm(x=x, residual=residual, y=y, threads=torch.get_num_threads(), **rest)
    return y


class MaxPool2d(torch.autograd.Function):
    """The maximum over size x size squares side by side, of relu(input) if asked for."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, size: int, relu: bool) -> Tensor:
        x = batch_innermost(input)
        y = empty((x.shape[0], x.shape[1] // size, x.shape[2] // size, x.shape[3]))
        place = torch.empty_like(y, dtype=torch.uint8)
        native.max_pool(x, size, relu, y, place, torch.get_num_threads())
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(place)
        ctx.size, ctx.input_shape = size, x.shape
        return result(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (place,) = ctx.saved_tensors
        grad_x = empty(ctx.input_shape)
        native.max_pool_backward(batch_innermost(grad_output), place, ctx.size, grad_x, torch.get_num_threads())
        return batch_first(grad_x), None, None
