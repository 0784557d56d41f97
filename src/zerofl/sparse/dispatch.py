"""Native or reference: the one place that decides which of the two computes, here and where updates are encoded."""

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zerofl.errors import ZeroFLError
from zerofl.sparse import cuda_select


class KernelsError(ZeroFLError, ValueError):
    """The kernels may not be used: the environment asks for what they do not have."""


class RefusedKernels:
    """In the kernels' place: the error comes where they are used, and not where zerofl is imported."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def __getattr__(self, name: str) -> Any:
        raise KernelsError(self._reason)


def _load() -> tuple[Any, str | None, str | None]:
    try:
        from zerofl import _native
    except ImportError as error:
        built = importlib.util.find_spec("zerofl._native") is not None
        return None, str(error) if built else "they could not be built when it was installed", None
    libraries = Path(torch.__file__).parent / "lib"
    _native.use_openmp_of(str(libraries / ("libtorch_cpu.dylib" if sys.platform == "darwin" else "libtorch_cpu.so")))
    wanted = os.environ.get("ZEROFL_ISA")
    if wanted and wanted not in _native.isas():
        have = ", ".join(_native.isas())
        reason = f"ZEROFL_ISA={wanted}: expected one that this processor has: {have}; or unset it, for the best"
        return RefusedKernels(reason), None, reason
    if wanted:
        _native.set_isa(wanted)
    return _native, None, None


native, UNAVAILABLE, REFUSED = _load()
"""The kernels' module; why there is none, or None; and why it may not be used though it is there, or None."""


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


def is_exporting() -> bool:
    """Whether torch.jit.trace, torch.onnx or torch.export is recording the model."""
    return torch.jit.is_tracing() or _is_exporting()  # type: ignore[attr-defined,no-untyped-call]


_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)  # torch 2.6 does not tell


def name(device: str, precision: str) -> str:
    """What trains a model there: the kernels' instruction set, or "reference: " and why, and what selects on a GPU."""
    if device != "cpu":
        of_torch = cuda_select.unavailable(torch.empty(0, device=device).device)
        return f"reference: {precision} on {device}, top K by {'torch.topk' if of_torch else 'select.cu'}"
    if UNAVAILABLE:
        return f"reference: {UNAVAILABLE}"
    return isa() if precision != "bfloat16" else f"reference: {precision} on {device}"


def isa() -> str:
    """The instruction set that the kernels use: "baseline", "avx2" or "avx512"."""
    return str(native.isa())


def sources() -> str:
    """SHA-256 of the sources that the kernels were built from; "" without kernels."""
    return "" if UNAVAILABLE else str(native.sources())
