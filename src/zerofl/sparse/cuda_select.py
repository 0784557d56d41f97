"""The top K on an NVIDIA GPU: select.cu, which NVIDIA's `cuda.core` compiles for the card when it is first needed.

Everything is launched on PyTorch's current stream and nothing waits for the device, so a CUDA graph can capture it.
"""

import functools
import warnings
from importlib.resources import files
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zerofl.errors import install_hint

THREADS, MOST_BLOCKS, PACK_BYTES = 512, 264, 16  # two blocks of find_digit on each of an H100's processors
STATE_INTS = 3 * 2048 + 6
ACTIVE = STATE_INTS - 1
"""Where `State` of select.cu has the number of active entries."""


class _Words(NamedTuple):
    """A floating-point type as select.cu sees it: the C type of its bits, and the key of infinity."""

    word: str
    infinity: int


WORDS = {
    torch.float32: _Words("unsigned", 0x7F800000),
    torch.bfloat16: _Words("unsigned short", 0x7F800000),
    torch.float16: _Words("unsigned short", 0x7C000000),
}


class _Kernels(NamedTuple):
    find_digit: Any
    keep_active: Any


def takes(x: Tensor) -> bool:
    """Whether select.cu can work on this: with 1 to 2^31 - 1 entries, of 32 or 16 bits, on a GPU it compiles for."""
    return (
        x.is_cuda
        and type(x) in (Tensor, torch.nn.Parameter)
        and x.dtype in WORDS
        and 0 < x.numel() < 2**31
        and not torch.compiler.is_compiling()
        and unavailable(x.device) is None
    )


@functools.cache
def unavailable(device: torch.device) -> str | None:
    """Why select.cu cannot be compiled for a GPU, which is said once; None if it can."""
    try:
        for word in {words.word for words in WORDS.values()}:
            _kernels(device, word)
    except Exception as error:  # no cuda.core, no NVRTC, or one that does not know the card
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, ImportError):
            reason += f"; {install_hint('gpu')}"
        warnings.warn(f"the top K is selected by torch.topk, which takes several times as long: {reason}", stacklevel=2)
        return reason
    return None


def kth_magnitude(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k-th largest magnitude in `x`, 1 <= k, and how many entries `count_active` counts; scalars on the device."""
    x = _packed(x)
    words, kernels = WORDS[x.dtype], _kernels(x.device, WORDS[x.dtype].word)
    state = torch.zeros(STATE_INTS, dtype=torch.int32, device=x.device)
    threshold = torch.empty((), dtype=x.dtype, device=x.device)
    blocks = min(MOST_BLOCKS, -(-x.numel() // (8 * THREADS)))
    for digit in range(3):
        arguments = (x.data_ptr(), state.data_ptr(), threshold.data_ptr(), x.numel(), k, digit, words.infinity)
        _launch(x.device, kernels.find_digit, blocks, *arguments)
    return threshold, state[ACTIVE]


def keep_active(x: Tensor, threshold: Tensor) -> Tensor:
    """`zerofl.sparse.topk.keep_active` of a threshold that is on the device and of the type of `x`."""
    x = _packed(x)
    out = torch.empty_like(x)
    words, kernels = WORDS[x.dtype], _kernels(x.device, WORDS[x.dtype].word)
    packs = x.numel() * x.element_size() // PACK_BYTES
    arguments = (x.data_ptr(), threshold.data_ptr(), out.data_ptr(), x.numel(), words.infinity)
    _launch(x.device, kernels.keep_active, packs // THREADS + 1, *arguments)
    return out


def _packed(x: Tensor) -> Tensor:
    """`x`, or a copy of it if its entries are not side by side in some order, or do not start where a pack may."""
    x = x.detach()
    if not in_memory_order(x).is_contiguous():
        return x.contiguous()
    return x.clone() if x.data_ptr() % PACK_BYTES else x


def in_memory_order(x: Tensor) -> Tensor:
    """`x` with its dimensions sorted by stride, the largest first: contiguous if its entries are side by side."""
    return x.permute(sorted(range(x.dim()), key=lambda dim: x.stride(dim), reverse=True))


@functools.cache
def _kernels(device: torch.device, word: str) -> _Kernels:
    from cuda.core import Device

    with torch.cuda.device(device):  # and the thread's own afterwards
        gpu = Device(device.index)
        gpu.set_current()  # its primary context, which is PyTorch's
        compiled = compile_kernels(f"sm_{gpu.arch}", word)
        return _Kernels(*(compiled.get_kernel(name) for name in _Kernels._fields))


def compile_kernels(arch: str, word: str) -> Any:
    """select.cu's kernels for a GPU's architecture, for example "sm_90", and a type of word; needs no GPU.

    Raises:
        Exception: what NVRTC finds wrong, in its own words; there is none; or cuda.core is not installed.
    """
    from cuda.core import Program, ProgramOptions

    source = files("zerofl.sparse").joinpath("select.cu").read_text(encoding="utf-8")
    macros = [("WORD", word), ("THREADS", str(THREADS))]
    return Program(source, "c++", ProgramOptions(arch=arch, std="c++17", define_macro=macros)).compile("cubin")


def _launch(device: torch.device, kernel: Any, blocks: int, *arguments: int) -> None:
    from cuda.core import LaunchConfig, Stream, launch

    with torch.cuda.device(device):
        stream = Stream.from_handle(torch.cuda.current_stream().cuda_stream)
        launch(stream, LaunchConfig(grid=blocks, block=THREADS), kernel, *arguments)
