"""A convolution, its batch normalisation, a residual and ReLU as one operation of the native kernels, each way.

What `kernels.Conv2d` and `dense_kernels.BatchNorm2d` do one after the other, to the last bit. Autograd sees one node,
Python is called once, and what lies between the two is kept inside: the convolution's output in 16 bits if asked for,
and its gradient only while it is used.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from zerofl.sparse.dispatch import native
from zerofl.sparse.in_backward import is_in_ddp, step_on, taken
from zerofl.sparse.kernels import (
    Choice,
    batch_first,
    batch_innermost,
    empty,
    geometry_of,
    operands,
    packed_of,
    result,
    samples_of,
)

_CODES = {name: code for code, name in enumerate(("float32", "float16", "bfloat16"))}  # as in cpp/kernels/kernels.h


class ConvNorm(torch.autograd.Function):
    """relu(norm(convolution(input)) + residual) with the batch's own statistics; residual and ReLU are optional.

    Returns what `kernels.Conv2d` does, with this in the output's place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        residual: Tensor | None,
        choices: tuple[Choice, "Choice | None"],
        for_grad_input: bool,
        sizes: tuple[tuple[int, ...], ...],
        running: tuple[Tensor | None, Tensor | None],
        momentum: float,
        epsilon: float,
        relu: bool,
        storage: str,
    ) -> tuple[Tensor, Tensor, float, float | None, int]:
        x, w = batch_innermost(input), weight.detach().contiguous()
        geometry = geometry_of(tuple(x.shape), tuple(w.shape), *sizes)
        y = empty(geometry.output)
        packed = native.ConvNorm(
            geometry,
            x,
            w,
            None if bias is None else bias.detach().contiguous(),
            *choices,
            for_grad_input,
            *running,
            momentum,
            epsilon,
            None if norm_weight is None else norm_weight.detach().contiguous(),
            None if norm_bias is None else norm_bias.detach().contiguous(),
            None if residual is None else batch_innermost(residual),
            relu,
            _CODES[storage],
            y,
            torch.get_num_threads(),
        )
        ctx.save_for_backward(norm_weight)
        ctx.packed, ctx.input_shape, ctx.weight, ctx.in_ddp = packed, x.shape, weight, is_in_ddp()
        ctx.channels, ctx.output_shape = len(w), y.shape
        ctx.set_materialize_grads(False)
        return result(y), samples_of(input, sizes[0]), *operands(packed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor | None, grad_samples: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_y is None:  # only the samples were used
            grad_y = batch_first(torch.zeros(ctx.output_shape, dtype=torch.float32, device="cpu"))
        (norm_weight,) = ctx.saved_tensors
        packed = packed_of(ctx)
        needs_input, needs_weight, needs_bias, needs_norm_weight, needs_norm_bias, needs_residual = (
            ctx.needs_input_grad[:6]
        )
        addend = grad_input = grad_weight = grad_output = grad_bias = grad_residual = None
        if needs_input:
            grad_input = empty(ctx.input_shape)
            addend = None if grad_samples is None else batch_innermost(grad_samples)
        sgd = step_on(ctx.weight, ctx.next_functions, ctx.in_ddp) if needs_weight else None
        if needs_weight and sgd is None:
            grad_weight = empty(ctx.weight.shape)
        if needs_bias:
            grad_output = empty(ctx.output_shape)
        if needs_residual:
            grad_residual = empty(ctx.output_shape)
        grad_norm_weight, grad_norm_bias = torch.empty(2, ctx.channels, dtype=torch.float32, device="cpu")
        packed.backward(
            batch_innermost(grad_y),
            None if norm_weight is None else norm_weight.detach().contiguous(),
            addend,
            grad_input,
            grad_weight,
            grad_output,
            grad_norm_weight,
            grad_norm_bias,
            grad_residual,
            torch.get_num_threads(),
            sgd,
        )
        if sgd is not None:
            taken(ctx.weight, sgd)
        if grad_output is not None:
            grad_bias = grad_output.sum((1, 2, 3))
        return (
            None if grad_input is None else batch_first(grad_input),
            grad_weight,
            grad_bias,
            grad_norm_weight if needs_norm_weight else None,
            grad_norm_bias if needs_norm_bias else None,
            None if grad_residual is None else batch_first(grad_residual),
            *[None] * 8,
        )
