"""The entries of an update in operations that any device has, against numpy's."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zerofl.exchange.aggregate import average
from zerofl.exchange.update import Update, active_entries, active_entries_on_device, entries, unpack_on_device

floats = st.floats(width=32) | st.sampled_from([0.0, -0.0, math.inf, -math.inf, math.nan, 1.0])


@given(st.lists(st.tuples(floats, floats), min_size=1, max_size=40), floats)
def test_entries_are_found_and_packed_as_numpy_does(pairs: list[tuple[float, float]], threshold: float) -> None:
    x, by = torch.tensor(pairs).T.contiguous()
    bits, values = active_entries_on_device(x, by, torch.tensor(abs(threshold)))
    expected_bits, expected_values = active_entries(x, by, abs(threshold))
    assert torch.equal(bits, expected_bits)
    assert torch.equal(values.view(torch.int32), expected_values.view(torch.int32))


@pytest.mark.parametrize("numel", [1, 7, 8, 9, 1000])
def test_bits_are_unpacked_again(numel: int) -> None:
    x = torch.randn(numel, generator=torch.Generator().manual_seed(numel))
    sparse = entries(x, x, torch.tensor(0.7))
    unpacked = unpack_on_device(sparse.bits, numel)
    assert torch.equal(unpacked, torch.from_numpy(sparse.mask()).to(torch.uint8))
    assert torch.equal(unpacked.nonzero().flatten(), sparse.positions())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_finds_and_adds_what_the_cpu_does() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 33, 3, 3, generator=generator)
    on_cpu, on_gpu = (entries(t, t, torch.tensor(1.2, device=t.device)) for t in (x, x.cuda()))
    assert torch.equal(on_cpu.bits, on_gpu.bits)
    assert torch.equal(on_cpu.values, on_gpu.values)
    received = {"w": x, "n": torch.tensor(3)}
    updates = [
        (Update(True, {"w": on_cpu, "n": torch.tensor(4)}), 5),
        (Update(True, {"w": x, "n": torch.tensor(5)}), 3),
    ]
    averages = [average(received, updates, device) for device in ("cpu", "cuda")]
    torch.testing.assert_close(averages[0], averages[1], rtol=1e-6, atol=1e-6)
