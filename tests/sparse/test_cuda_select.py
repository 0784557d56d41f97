"""select.cu against sorting: on a GPU where there is one, and everywhere with a CPU's threads as a block's."""

import ctypes
import importlib.util
import math
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from zerofl.sparse import cuda_select
from zerofl.sparse.topk import active, keep_active, top_k, top_k_threshold_by_sorting

SOURCE = Path(cuda_select.__file__).with_name("select.cu")
WORDS = {torch.float32: "uint32_t", torch.float16: "uint16_t", torch.bfloat16: "uint16_t"}

Selection = Callable[[Tensor, int], tuple[Tensor, int, Tensor]]
"""(x, k) -> the threshold, how many entries are active, and x without the others."""


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Selection:
    """select.cu run by a CPU, with 32 threads a block and two blocks."""
    if (compiler := shutil.which("g++")) is None:
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("emulated")
    libraries: dict[str, ctypes.CDLL] = {}
    for word in set(WORDS.values()):
        library = folder / f"{word}.so"
        command = [compiler, "-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", "-include", "cstdint"]
        macros = [f"-DWORD={word}", "-DTHREADS=32", f"-I{SOURCE.parent}"]
        subprocess.run([*command, *macros, Path(__file__).with_name("emulate.cpp"), "-o", library], check=True)
        libraries[word] = ctypes.CDLL(str(library))

    def select(x: Tensor, k: int) -> tuple[Tensor, int, Tensor]:
        threshold, out = torch.empty((), dtype=x.dtype), torch.empty_like(x)
        found = libraries[WORDS[x.dtype]].emulate(
            *(ctypes.c_void_p(t.data_ptr()) for t in (x, threshold, out)),
            *(ctypes.c_longlong(v) for v in (x.numel(), k, cuda_select.WORDS[x.dtype].infinity)),
            ctypes.c_uint(2),
        )
        return threshold, found, out

    return select


def check(x: Tensor, k: int, selection: Selection) -> None:
    """Compare a selection with sorting, bit for bit."""
    threshold, count, kept = selection(x, k)
    expected = top_k_threshold_by_sorting(x, k)
    torch.testing.assert_close(threshold, expected, rtol=0, atol=0, equal_nan=True)
    is_active = active(x, expected)
    assert count == (x.numel() if expected.isnan() else (is_active & (x != 0)).sum())
    assert torch.equal(bits(kept), torch.where(is_active, bits(x), 0))


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int32 if x.element_size() == 4 else torch.int16)


floats = st.floats(width=16) | st.sampled_from([0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, -1.0])


@pytest.mark.parametrize("dtype", WORDS)
@settings(max_examples=25, deadline=None)
@given(values=st.lists(floats, min_size=1, max_size=70), data=st.data())
def test_emulated_selection_of_any_values(
    emulated: Selection, dtype: torch.dtype, values: list[float], data: st.DataObject
) -> None:
    check(torch.tensor(values).to(dtype), data.draw(st.integers(1, len(values))), emulated)


@pytest.mark.parametrize("dtype", WORDS)
@pytest.mark.parametrize("numel", [1, 3, 4097, 10_000])
def test_emulated_selection_of_a_layer(emulated: Selection, dtype: torch.dtype, numel: int) -> None:
    """With ties, and as ReLU leaves it, for k from one to all."""
    x = torch.randn(numel, generator=torch.Generator().manual_seed(numel)).to(dtype)
    for values in (x, x.relu(), x.to(torch.float32).round(decimals=1).to(dtype), torch.zeros_like(x)):
        for k in {1, -(-numel // 20), numel // 2 + 1, numel}:
            check(values, k, emulated)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", WORDS)
@pytest.mark.parametrize("shape", [(32, 64, 32, 32), (512, 512, 3, 3), (7, 5, 3, 3), (1,), (4099,)])
def test_selection_on_a_gpu(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    def selection(x: Tensor, k: int) -> tuple[Tensor, int, Tensor]:
        if reason := cuda_select.unavailable(x.device):
            pytest.skip(reason)
        assert cuda_select.takes(x)
        threshold, count = top_k(x, k)
        kept = keep_active(x, threshold)
        assert kept.stride() == x.stride()
        return threshold, int(count), kept

    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to("cuda", dtype)
    layouts = [x, x.relu(), *([x.contiguous(memory_format=torch.channels_last)] if x.dim() == 4 else [])]
    nan = x.clone()
    nan.view(-1)[::3] = math.nan
    for values in (*layouts, nan):
        for k in {1, -(-x.numel() // 20), x.numel() // 3 + 1, x.numel()}:
            check(values, k, selection)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_entries_that_are_not_side_by_side_or_not_aligned() -> None:
    x = torch.randn(64, 33, device="cuda")
    for part in (x[:, ::2], x.flatten()[1:], x[3:7, 5:9]):
        threshold, count = top_k(part, 3)
        assert threshold == top_k_threshold_by_sorting(part, 3)
        assert int(count) == 3
        assert torch.equal(keep_active(part, threshold), torch.where(active(part, threshold), part, 0.0))


def has_cuda_core() -> bool:
    """PyTorch's own wheels for CUDA bring other parts of the package `cuda`."""
    return importlib.util.find_spec("cuda") is not None and importlib.util.find_spec("cuda.core") is not None


@pytest.mark.skipif(not has_cuda_core(), reason="needs cuda.core and NVRTC")
@pytest.mark.parametrize("word", sorted({words.word for words in cuda_select.WORDS.values()}))
def test_it_compiles_for_every_card_since_turing(word: str) -> None:
    for arch in ("sm_75", "sm_80", "sm_90"):
        assert len(cuda_select.compile_kernels(arch, word).code) > 1000


def test_what_it_does_not_take() -> None:
    assert not cuda_select.takes(torch.ones(4))  # on the CPU
