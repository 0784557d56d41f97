"""SWAT's convolution and linear layer (§3.1, Eqs. 1 and 2) in plain PyTorch: the readable specification.

Both multiply by dense operands that hold zeros, so they define the result and do not save time. In each:

    forward      output      = f(input, top-k weight)                     the stored weight stays dense
    Eq. 1        grad_input  = G(grad_output, top-k weight)
    Eq. 2        grad_weight = H(grad_output, top-k input)                dense, and not masked (straight-through)

An inactive weight therefore keeps learning and can become active. Thresholds come from `topk`; the activation
threshold may be None when no weight gradient will be asked for.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input, conv2d_weight

from zerofl.sparse.topk import keep_active


class Conv2d(torch.autograd.Function):
    """SWAT's 2-D convolution: input [N, C, H, W], weight [O, C / groups, kH, kW], bias [O] -> output [N, O, H', W']."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        weight_threshold: Tensor,
        activation_threshold: Tensor | None,
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        groups: int,
    ) -> Tensor:
        weight_top_k = keep_active(weight, weight_threshold)
        input_top_k = None if activation_threshold is None else keep_active(input, activation_threshold)
        ctx.save_for_backward(weight_top_k, input_top_k)
        ctx.input_shape = input.shape
        ctx.geometry = (stride, padding, dilation, groups)
        return F.conv2d(input, weight_top_k, bias, *ctx.geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        weight_top_k, input_top_k = ctx.saved_tensors
        grad_input = grad_weight = grad_bias = None
        # The casts only act under autocast, where grad_output is in the lower precision.
        if ctx.needs_input_grad[0]:
            weight_top_k = weight_top_k.to(grad_output.dtype)
            grad_input = conv2d_input(  # type: ignore[no-untyped-call]
                ctx.input_shape, weight_top_k, grad_output, *ctx.geometry
            )
        if ctx.needs_input_grad[1]:
            input_top_k = input_top_k.to(grad_output.dtype)
            grad_weight = conv2d_weight(  # type: ignore[no-untyped-call]
                input_top_k, weight_top_k.shape, grad_output, *ctx.geometry
            )
        if ctx.needs_input_grad[2]:
            grad_bias = grad_output.sum((0, 2, 3))
        return grad_input, grad_weight, grad_bias, None, None, None, None, None, None


class Linear(torch.autograd.Function):
    """SWAT's linear layer: input [..., I], weight [O, I], bias [O] or None -> [..., O]."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        weight_threshold: Tensor,
        activation_threshold: Tensor | None,
    ) -> Tensor:
        weight_top_k = keep_active(weight, weight_threshold)
        input_top_k = None if activation_threshold is None else keep_active(input, activation_threshold)
        ctx.save_for_backward(weight_top_k, input_top_k)
        output = F.linear(input, weight_top_k, bias)
        # Of other than two dimensions that is a view, which nothing behind the Function could change in place.
        return torch.ops.aten._unsafe_view(output, output.shape)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        weight_top_k, input_top_k = ctx.saved_tensors
        rows = grad_output.reshape(-1, grad_output.shape[-1])
        grad_input = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_input = grad_output @ weight_top_k.to(grad_output.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = rows.T @ input_top_k.to(grad_output.dtype).reshape(-1, input_top_k.shape[-1])
        if ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0)
        return grad_input, grad_weight, grad_bias, None, None
