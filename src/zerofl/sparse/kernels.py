"""SWAT's products on the native kernels: what `zerofl.sparse.swat` defines, on operands that hold only the non-zeros.

Inside, activations are stored batch innermost: memory order [C, H, W, N]. A tensor comes and goes as PyTorch's
[N, C, H, W] with the strides of that order, so that a chain of these layers and of elementwise operations never moves
data; other strides cost a copy. Threads follow `torch.get_num_threads()` and are those of torch's own OpenMP runtime.
The kernels' results do not depend on their number (a bias's gradient and a 1x1 convolution are PyTorch's sums, which
may); they may differ in rounding between instruction sets.
"""

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from zerofl.sparse.dispatch import native
from zerofl.sparse.in_backward import candidates_of, is_in_ddp, step_on, taken

if TYPE_CHECKING:
    from zerofl._native import AtLeast, TopK

Choice: TypeAlias = "TopK | AtLeast"
"""Which entries of a tensor are active: the k largest in magnitude, or all from a threshold on."""


def batch_innermost(x: Tensor) -> Tensor:
    """[N, C, H, W] -> contiguous [C, H, W, N]; without a copy where the strides are those already."""
    return x.detach().permute(1, 2, 3, 0).contiguous()


def batch_first(x: Tensor) -> Tensor:
    """[C, H, W, N] -> a view [N, C, H, W]."""
    return x.permute(3, 0, 1, 2)


def result(x: Tensor) -> Tensor:
    """[C, H, W, N] -> [N, C, H, W] on the same memory, for a Function to return."""
    return _own(batch_first(x))


def _own(x: Tensor) -> Tensor:
    """`x` as a tensor of its own on the same memory.

    A view that a Function returns cannot be changed in place, as a ReLU or a residual's addition behind it may want to.
    """
    return torch.ops.aten._unsafe_view(x, x.shape)  # type: ignore[no-any-return]


def empty(shape: Sequence[int]) -> Tensor:
    """An uninitialised float32 tensor; a large one in memory that is kept and used again."""
    return native.empty(shape) if math.prod(shape) >= _POOLED else small(shape)


def small(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """An uninitialised tensor in ordinary memory, on the CPU."""
    return torch.empty(shape, dtype=dtype, device="cpu")  # whatever the defaults are


_POOLED = 1 << 15  # floats; smaller ones cost the system nothing


def top_k_threshold(x: Tensor, k: int) -> float:
    """`zerofl.sparse.topk.top_k_threshold` of a contiguous tensor that `dispatch.takes` accepts."""
    return float(native.top_k_threshold(x.detach(), k, torch.get_num_threads()))


def active_entries(x: Tensor, by: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """The entries of `x` that are not +0 and where the magnitude of `by` is not below the threshold.

    Both are contiguous tensors of one shape that `dispatch.takes` accepts; returns a bit for each entry, as in
    `zerofl.exchange.update.Sparse`, and the values.
    """
    x, by = x.detach().flatten(), by.detach().flatten()
    bits = small((-(-len(x) // 8),), torch.uint8)
    values = small((native.active_bits(x, by, threshold, bits),))
    native.take_bits(x, bits, values)
    return bits, values


def entries_at(x: Tensor, bits: Tensor, count: int) -> Tensor:
    """The entries of a contiguous `x` that have a bit, of which there are `count`: float32 [count]."""
    # numpy's memory, which is not aligned, leaves fewer holes: with torch.empty ten updates peak at 0.2 models more.
    values = torch.from_numpy(np.empty(count, np.float32))
    native.take_bits(x.detach().view(-1), bits, values)
    return values


def add_entries(x: Tensor, bits: Tensor, values: Tensor, weight: float) -> None:
    """Add to the entries of a contiguous `x` that have a bit a value each, times a weight."""
    native.add_entries(x.view(-1), bits, values, weight)


class Chosen(NamedTuple):
    """What was active: all from these thresholds on. The input's is None if its entries were not looked for."""

    weight_threshold: float
    input_threshold: float | None
    active_weights: int


@functools.lru_cache(maxsize=1024)
def geometry_of(*sizes: tuple[int, ...]) -> Any:
    """The kernels' geometry of a convolution: input [C, H, W, N], weight, stride, padding and dilation."""
    return native.Geometry(*sizes)


def samples_of(input: Tensor, stride: tuple[int, ...]) -> Tensor:
    """Every stride-th position of the input [N, C, H, W], for a Function to return."""
    return input.view_as(input) if stride == (1, 1) else input[:, :, :: stride[0], :: stride[1]]


def operands(packed: Any) -> tuple[float, float | None, int]:
    """The thresholds and the number of active weights of a layer's operands, for a Function to return."""
    return packed.weight_threshold, packed.input_threshold, packed.active_weights


class Conv2d(torch.autograd.Function):
    """`zerofl.sparse.swat.Conv2d`, which finds the active entries itself.

    Returns output, input samples, both thresholds, and the number of active weights.

    The samples are every stride-th position of the input, with a stride of 1 all of it. If a residual connection takes
    them, their gradient is added where the convolution's is computed, without a pass over memory of its own.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        weight_choice: Choice,
        input_choice: "Choice | None",
        for_grad_input: bool,
        sizes: tuple[tuple[int, ...], ...],
    ) -> tuple[Tensor, Tensor, float, float | None, int]:
        x, w = batch_innermost(input), weight.detach().contiguous()
        geometry = geometry_of(tuple(x.shape), tuple(w.shape), *sizes)
        output = empty(geometry.output)
        packed = native.Convolution(
            geometry, x, w, _vector(bias), output, weight_choice, input_choice, for_grad_input, torch.get_num_threads()
        )
        ctx.packed, ctx.input_shape, ctx.weight, ctx.output_shape = packed, x.shape, weight, output.shape
        ctx.in_ddp = is_in_ddp()
        ctx.set_materialize_grads(False)
        return result(output), samples_of(input, sizes[0]), *operands(packed)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_output: Tensor | None, grad_samples: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            # Only the samples were used.
            grad_output = batch_first(torch.zeros(ctx.output_shape, dtype=torch.float32, device="cpu"))
        packed = packed_of(ctx)
        dy = batch_innermost(grad_output)
        addend = grad_input = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_input = empty(ctx.input_shape)
            addend = None if grad_samples is None else batch_innermost(grad_samples)
        sgd = step_on(ctx.weight, ctx.next_functions, ctx.in_ddp) if ctx.needs_input_grad[1] else None
        if ctx.needs_input_grad[1] and sgd is None:
            grad_weight = empty(ctx.weight.shape)
        packed.backward(dy, addend, grad_input, grad_weight, torch.get_num_threads(), sgd)
        if sgd is not None:
            taken(ctx.weight, sgd)
        if ctx.needs_input_grad[2]:
            grad_bias = dy.sum((1, 2, 3))
        return None if grad_input is None else batch_first(grad_input), grad_weight, grad_bias, *[None] * 4


def packed_of(ctx: Any) -> Any:
    """The forward pass's operands, for the backward pass; freed with it unless the graph is kept."""
    packed = ctx.packed
    if packed is None:
        raise RuntimeError(
            "Trying to backward through a sparse layer a second time; its operands were freed with the first. Say "
            "retain_graph=True there"
        )
    if not torch._C._autograd._get_current_graph_task_keep_graph():
        ctx.packed = None  # as autograd does with what it keeps itself
    return packed


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_choice: Choice,
    input_choice: Choice,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[Tensor, Tensor, Chosen]:
    """Output [N, O, H', W'] and samples of input [N, C, H, W] and weight [O, C, kH, kW]: see `Conv2d`.

    The input's entries are looked for only if a gradient of the weight can be asked for.
    """
    with_grad = torch.is_grad_enabled()
    output, samples, *chosen = Conv2d.apply(  # type: ignore[no-untyped-call]
        input,
        weight,
        bias,
        weight_choice,
        input_choice if with_grad and weight.requires_grad else None,
        with_grad and input.requires_grad,
        (tuple(stride), tuple(padding), tuple(dilation)),
    )
    return output, samples, Chosen(*chosen)


class Linear(torch.autograd.Function):
    """`zerofl.sparse.swat.Linear` on rows [N, I], which finds the active entries itself.

    Returns output, both thresholds, and the number of active weights.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        weight_choice: Choice,
        input_choice: "Choice | None",
        for_grad_input: bool,
    ) -> tuple[Tensor, float, float | None, int]:
        x, w = input.detach().T.contiguous(), weight.detach().contiguous()
        output = empty((len(w), x.shape[1]))
        packed = native.Linear(
            x,
            w,
            _vector(bias),
            output,
            weight_choice,
            input_choice,
            for_grad_input,
            torch.get_num_threads(),
            candidates_of(weight),
        )
        ctx.packed, ctx.input_shape, ctx.weight, ctx.in_ddp = packed, x.shape, weight, is_in_ddp()
        # Stored as nn.Linear's, so that .view() works behind it; of a few numbers this copy takes no time.
        return _own(output.T.contiguous()), *operands(packed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        packed, dy = packed_of(ctx), grad_output.T.contiguous()
        grad_input = empty(ctx.input_shape) if ctx.needs_input_grad[0] else None
        sgd = step_on(ctx.weight, ctx.next_functions, ctx.in_ddp) if ctx.needs_input_grad[1] else None
        grad_weight = empty(ctx.weight.shape) if ctx.needs_input_grad[1] and sgd is None else None
        packed.backward(dy, grad_input, grad_weight, torch.get_num_threads(), sgd)
        if sgd is not None:
            taken(ctx.weight, sgd)
        grad_bias = dy.sum(1) if ctx.needs_input_grad[2] else None
        return None if grad_input is None else grad_input.T, grad_weight, grad_bias, None, None, None


def linear(
    input: Tensor, weight: Tensor, bias: Tensor | None, weight_choice: Choice, input_choice: Choice
) -> tuple[Tensor, Chosen]:
    """Output [N, O] of rows [N, I] and weight [O, I]: see `Linear`, and `conv2d` for the input's entries."""
    with_grad = torch.is_grad_enabled()
    output, *chosen = Linear.apply(  # type: ignore[no-untyped-call]
        input,
        weight,
        bias,
        weight_choice,
        input_choice if with_grad and weight.requires_grad else None,
        with_grad and input.requires_grad,
    )
    return output, Chosen(*chosen)


def _vector(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().contiguous()
