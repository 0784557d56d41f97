"""SWAT's products on the native kernels: what `zerofl.sparse.swat` defines, on operands that hold only the non-zeros.

Inside, activations lie batch innermost: memory order [C, H, W, N]. A tensor comes and goes as PyTorch's [N, C, H, W]
with the strides of that order, so that a chain of these layers and of elementwise operations never moves data; other
strides cost a copy. Threads follow `torch.get_num_threads()` and are those of torch's own OpenMP runtime. The kernels'
results do not depend on their number (a bias's gradient and a 1x1 convolution are PyTorch's sums, which may); they may
differ in rounding between instruction sets.
"""

import functools
import importlib.util
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from zerofl.errors import ZeroFLError


class KernelsError(ZeroFLError, ValueError):
    """The kernels may not be used: the environment asks for what they do not have."""


class _Refused:
    """In the kernels' place: the error comes where they are used, and not where zerofl is imported."""

    def __getattr__(self, name: str) -> Any:
        raise KernelsError(REFUSED)


REFUSED: str | None = None
"""Why the kernels may not be used although they are there: each use raises KernelsError."""

try:
    from zerofl import _native
except ImportError as error:
    built = importlib.util.find_spec("zerofl._native") is not None
    UNAVAILABLE: str | None = str(error) if built else "they could not be built when it was installed"
else:
    UNAVAILABLE = None
    _libraries = Path(torch.__file__).parent / "lib"
    _native.use_openmp_of(str(_libraries / ("libtorch_cpu.dylib" if sys.platform == "darwin" else "libtorch_cpu.so")))
    if wanted := os.environ.get("ZEROFL_ISA"):
        if wanted in _native.isas():
            _native.set_isa(wanted)
        else:
            have = ", ".join(_native.isas())
            REFUSED = f"ZEROFL_ISA={wanted}: expected one that this processor has: {have}; or unset it, for the best"
            _native = _Refused()  # type: ignore[assignment]


def isa() -> str:
    """The instruction set that the kernels use: "baseline", "avx2" or "avx512"."""
    return _native.isa()


def sources() -> str:
    """SHA-256 of the sources that the kernels were built from; "" without kernels."""
    return "" if UNAVAILABLE else _native.sources()


def seconds() -> dict[str, float]:
    """What the kernels have taken since the last call, by part of a training step."""
    return _native.seconds()


def is_exporting() -> bool:
    """Whether torch.jit.trace, torch.onnx or torch.export is recording the model."""
    return torch.jit.is_tracing() or _is_exporting()  # type: ignore[attr-defined,no-untyped-call]


_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)  # torch 2.6 does not tell


def takes(*tensors: Tensor | None) -> bool:
    """Whether the kernels can work on these: float32 with entries, on the CPU, outside autocast and fake tensors."""
    return (
        UNAVAILABLE is None
        and not is_exporting()
        and not torch.is_autocast_enabled("cpu")
        and all(
            t is None or (type(t) in _PLAIN and t.device.type == "cpu" and t.dtype == torch.float32 and t.numel() > 0)
            for t in tensors
        )
    )


_PLAIN = (Tensor, torch.nn.Parameter)


def batch_innermost(x: Tensor) -> Tensor:
    """[N, C, H, W] -> contiguous [C, H, W, N]; without a copy where the strides are those already."""
    return x.detach().permute(1, 2, 3, 0).contiguous()


def batch_first(x: Tensor) -> Tensor:
    """[C, H, W, N] -> a view [N, C, H, W]."""
    return x.permute(3, 0, 1, 2)


def _result(x: Tensor) -> Tensor:
    """[C, H, W, N] -> [N, C, H, W] on the same memory, as a tensor of its own.

    A view that a Function returns cannot be changed in place, as a ReLU or a residual's addition behind it may want to.
    """
    y = batch_first(x)
    return torch.ops.aten._unsafe_view(y, y.shape)  # type: ignore[no-any-return]


def empty(shape: Sequence[int]) -> Tensor:
    """An uninitialised float32 tensor; a large one in memory that is kept and used again."""
    return _native.empty(shape) if math.prod(shape) >= _POOLED else _small(shape)


def _small(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cpu")  # whatever the defaults are


_POOLED = 1 << 15  # floats; smaller ones cost the system nothing


def top_k_threshold(x: Tensor, k: int) -> float:
    """`zerofl.sparse.topk.top_k_threshold` of a contiguous tensor that `takes` accepts."""
    return _native.top_k_threshold(x.detach(), k, torch.get_num_threads())


class Choice(NamedTuple):
    """Which entries of a tensor are active: all from `threshold` on if `exact`, else the `k` largest in magnitude.

    Those begin near `threshold`, if that is above 0: then finding them takes one pass over the tensor. The result does
    not depend on it.
    """

    k: int
    threshold: float = 0.0
    exact: bool = False


EVERY = Choice(k=0, threshold=0.0, exact=True)


@functools.lru_cache(maxsize=1024)
def _geometry(*sizes: tuple[int, ...]) -> Any:
    return _native.Geometry(*sizes)


class Conv2d(torch.autograd.Function):
    """`zerofl.sparse.swat.Conv2d`, which finds the active entries itself.

    Returns output, input samples, both thresholds, and the number of active weights.

    The samples are every stride-th position of the input, with a stride of 1 all of it. If a residual connection goes
    on with them, their gradient is added where the convolution's is computed, without a pass over memory of its own.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        weight_choice: Choice,
        input_choice: Choice | None,
        for_grad_input: bool,
        sizes: tuple[tuple[int, ...], ...],
    ) -> tuple[Tensor, Tensor, float, float | None, int]:
        x, w = batch_innermost(input), weight.detach().contiguous()
        geometry = _geometry(tuple(x.shape), tuple(w.shape), *sizes)
        output = empty(geometry.output)
        packed = _native.Convolution(
            geometry,
            x,
            w,
            None if bias is None else bias.detach().contiguous(),
            output,
            weight_choice,
            input_choice,
            for_grad_input,
            torch.get_num_threads(),
        )
        ctx.packed, ctx.input_shape, ctx.weight_shape, ctx.output_shape = packed, x.shape, w.shape, output.shape
        ctx.set_materialize_grads(False)
        stride = sizes[0]
        samples = input.view_as(input) if stride == (1, 1) else input[:, :, :: stride[0], :: stride[1]]
        return _result(output), samples, packed.weight_threshold, packed.input_threshold, packed.active_weights

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_output: Tensor | None, grad_samples: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            # Only the samples were used.
            grad_output = batch_first(torch.zeros(ctx.output_shape, dtype=torch.float32, device="cpu"))
        if ctx.packed is None:
            raise RuntimeError(
                "Trying to backward through a sparse layer a second time; its operands were freed with the first. Say "
                "retain_graph=True there"
            )
        dy = batch_innermost(grad_output)
        addend = grad_input = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_input = empty(ctx.input_shape)
            addend = None if grad_samples is None else batch_innermost(grad_samples)
        if ctx.needs_input_grad[1]:
            grad_weight = empty(ctx.weight_shape)
        ctx.packed.backward(dy, addend, grad_input, grad_weight, torch.get_num_threads())
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            ctx.packed = None  # as autograd does with what it keeps itself
        if ctx.needs_input_grad[2]:
            grad_bias = dy.sum((1, 2, 3))
        return None if grad_input is None else batch_first(grad_input), grad_weight, grad_bias, *[None] * 4


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_choice: Choice,
    input_choice: Choice,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[Tensor, Tensor, float, float | None, int]:
    """See `Conv2d`: input [N, C, H, W], weight [O, C, kH, kW] -> [N, O, H', W']; the thresholds are floats.

    The input's entries are looked for only if a gradient of the weight can be asked for; else its threshold is None.
    """
    with_grad = torch.is_grad_enabled()
    return Conv2d.apply(  # type: ignore[no-any-return,no-untyped-call]
        input,
        weight,
        bias,
        weight_choice,
        input_choice if with_grad and weight.requires_grad else None,
        with_grad and input.requires_grad,
        (tuple(stride), tuple(padding), tuple(dilation)),
    )


class BatchNorm2d(torch.autograd.Function):
    """relu(batch_norm(input) + residual) with the batch's own statistics; residual and ReLU are optional.

    Moves the running statistics, if given, towards the batch's by `momentum`.
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
    ) -> Tensor:
        x = batch_innermost(input)
        mean, variance = _small(x.shape[:1]), _small(x.shape[:1])
        weight, bias = (None if t is None else t.detach().contiguous() for t in (weight, bias))
        needs_grad = any(ctx.needs_input_grad)
        positive = _small((x.shape[0], -(-x[0].numel() // 8)), torch.uint8) if relu and needs_grad else None
        y = _normalise(x, True, mean, variance, *running, momentum, weight, bias, residual, eps, relu, positive)
        if needs_grad:
            ctx.save_for_backward(x, positive, mean, variance, weight)
        ctx.eps = eps
        return _result(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, positive, mean, variance, weight = ctx.saved_tensors
        grad_y, grad_x = batch_innermost(grad_output), empty(x.shape)
        grad_weight, grad_bias = torch.empty_like(mean), torch.empty_like(mean)
        grad_residual = empty(x.shape) if ctx.needs_input_grad[3] else None
        _native.batch_norm_backward(
            grad_y,
            x,
            positive,
            mean,
            variance,
            ctx.eps,
            weight,
            grad_x,
            grad_weight,
            grad_bias,
            grad_residual,
            torch.get_num_threads(),
        )
        return (
            batch_first(grad_x),
            grad_weight if ctx.needs_input_grad[1] else None,
            grad_bias if ctx.needs_input_grad[2] else None,
            None if grad_residual is None else batch_first(grad_residual),
            *[None] * 4,
        )


def batch_norm_of_batch(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running: tuple[Tensor | None, Tensor | None],
    momentum: float,
    eps: float,
    relu: bool,
) -> Tensor:
    """See `BatchNorm2d`."""
    return BatchNorm2d.apply(  # type: ignore[no-any-return,no-untyped-call]
        input, weight, bias, residual, running, momentum, eps, relu
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
    return batch_first(_normalise(x, False, mean, variance, None, None, 0.0, weight, bias, residual, eps, relu, None))


def _normalise(
    x: Tensor,
    of_batch: bool,
    mean: Tensor,
    variance: Tensor,
    running_mean: Tensor | None,
    running_variance: Tensor | None,
    momentum: float,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    relu: bool,
    positive: Tensor | None,
) -> Tensor:
    y = empty(x.shape)
    _native.batch_norm(
        x,
        of_batch,
        mean,
        variance,
        running_mean,
        running_variance,
        momentum,
        eps,
        weight,
        bias,
        None if residual is None else batch_innermost(residual),
        relu,
        y,
        positive,
        torch.get_num_threads(),
    )
    return y


class MaxPool2d(torch.autograd.Function):
    """The maximum over size x size squares side by side, of relu(input) if asked for."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, size: int, relu: bool) -> Tensor:
        x = batch_innermost(input)
        y = empty((x.shape[0], x.shape[1] // size, x.shape[2] // size, x.shape[3]))
        place = torch.empty_like(y, dtype=torch.uint8)
        _native.max_pool(x, size, relu, y, place, torch.get_num_threads())
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(place)
        ctx.size, ctx.input_shape = size, x.shape
        return _result(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (place,) = ctx.saved_tensors
        grad_x = empty(ctx.input_shape)
        _native.max_pool_backward(batch_innermost(grad_output), place, ctx.size, grad_x, torch.get_num_threads())
        return batch_first(grad_x), None, None


def max_pool2d(input: Tensor, size: int, relu: bool) -> Tensor:
    """See `MaxPool2d`."""
    return MaxPool2d.apply(input, size, relu)  # type: ignore[no-any-return,no-untyped-call]


def ans_decode(cumulative: np.ndarray, words: np.ndarray, size: int) -> tuple[np.ndarray, bool]:
    """The `size` bytes that words, uint32, hold, and whether they hold just so many: see `exchange.wire.entropy`.

    `cumulative`, uint32 [257], are the sums of the bytes' probabilities.
    """
    bitmap = np.empty(size, np.uint8)
    return bitmap, _native.ans_decode(cumulative, words, bitmap)


def active_entries(x: Tensor, by: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """The entries of `x` that are not +0 and where the magnitude of `by` is not below the threshold.

    Both are contiguous tensors of one shape that `takes` accepts; returns a bit for each entry, as in
    `zerofl.exchange.update.Sparse`, and the values.
    """
    x, by = x.detach().flatten(), by.detach().flatten()
    bits = _small((-(-len(x) // 8),), torch.uint8)
    values = _small((_native.active_bits(x, by, threshold, bits),))
    _native.take_bits(x, bits, values)
    return bits, values


def split_planes(numbers: np.ndarray) -> np.ndarray:
    """uint32 [n] -> its bits rotated left by one, in planes of bytes, the highest first: uint8 [4, n]."""
    planes = np.empty((4, len(numbers)), np.uint8)
    _native.split_planes(numbers, planes.reshape(-1))
    return planes


def merge_planes(planes: np.ndarray) -> np.ndarray:
    """The numbers, uint32 [n], that `split_planes` split."""
    numbers = np.empty(planes.shape[1], np.uint32)
    _native.merge_planes(planes.reshape(-1), numbers)
    return numbers
