"""The top-K operator of §3.1: which entries of a tensor are active.

Tie rule: every entry whose magnitude equals that of the K-th largest is active, so the active set does not depend on
the order in which entries are stored. NaN counts as the largest magnitude and stays active, so that a diverged
tensor shows itself instead of being zeroed.
"""

import functools
import math
from fractions import Fraction

import torch
from torch import Tensor

from zerofl.sparse import kernels
from zerofl.sparse.dispatch import takes


@functools.lru_cache(maxsize=4096)
def count_top_k(numel: int, sparsity: float, mask_ratio: float = 0.0) -> int:
    """K = ceil((1 - sparsity + mask_ratio) * numel), at most `numel` (§3.1; with the mask ratio, §5).

    The arithmetic is exact on the decimals as written: 5 % of 100 is 5, where floats would make it 6.
    """
    fraction = 1 - Fraction(str(sparsity)) + Fraction(str(mask_ratio))
    return min(numel, math.ceil(fraction * numel))


def top_k_threshold(x: Tensor, k: int) -> Tensor:
    """The K-th largest magnitude in `x`, a scalar on the device of `x`; infinity for k = 0.

    Equals `top_k_threshold_by_sorting`, its specification, without sorting.
    """
    _check_k(x, k)
    if k == 0:
        return x.new_full((), math.inf)
    if takes(x):
        return torch.tensor(kernels.top_k_threshold(_in_memory_order(x), k))
    magnitudes = x.detach().abs().flatten()
    kth_smallest = magnitudes.numel() - k
    if x.device.type != "cpu":
        return kth_by_digits(magnitudes, kth_smallest + 1)
    # numpy's vectorised partition, in place on our copy, takes a tenth of the time of torch.kthvalue; it has no
    # half-precision types, which float32 holds exactly.
    exact = (magnitudes if x.dtype in (torch.float32, torch.float64) else magnitudes.float()).numpy()
    exact.partition(kth_smallest)
    return torch.tensor(exact[kth_smallest], dtype=x.dtype)


def top_k_threshold_by_sorting(x: Tensor, k: int) -> Tensor:
    """The K-th largest magnitude in `x`, as one reads it in §3.1: sort by magnitude and take the K-th."""
    _check_k(x, k)
    if k == 0:
        return x.new_full((), math.inf)
    return x.detach().abs().flatten().sort(descending=True).values[k - 1]


def kth_by_digits(magnitudes: Tensor, kth: int) -> Tensor:
    """The `kth` smallest (from 1) of magnitudes [n], for devices on which a selection by sorting is slow.

    Floats that are not negative are ordered as their bits are. The bits are settled eight at a time, the highest first:
    a histogram of those entries that share the digits found so far says which digit the kth one has. Nothing waits for
    the device.
    """
    exact = magnitudes.to(torch.float32) if magnitudes.element_size() < 4 else magnitudes
    bits = exact.view(torch.int32 if exact.element_size() == 4 else torch.int64)
    rank = torch.full((), kth, dtype=torch.int64, device=bits.device)
    found = torch.zeros((), dtype=bits.dtype, device=bits.device)
    digits = torch.arange(256, device=bits.device)
    for shift in range(8 * bits.element_size() - 8, -1, -8):
        # The digit of an entry with the same higher digits, else 256, which is not counted. (Two shifts, since one of
        # all the bits is none.)
        same = (bits >> shift >> 8) == (found >> shift >> 8)
        digit = torch.where(same, (bits >> shift) & 255, 256)
        counts = torch.zeros(257, dtype=torch.int64, device=bits.device)
        counts.scatter_add_(0, digit.long(), torch.ones_like(digit, dtype=torch.int64))
        below = counts[:256].cumsum(0)
        chosen = (below < rank).sum()
        rank = rank - torch.where(digits < chosen, counts[:256], 0).sum()
        found = found | (chosen.to(bits.dtype) << shift)
    return found.view(exact.dtype).to(magnitudes.dtype)


def active(x: Tensor, threshold: Tensor | float) -> Tensor:
    """Which entries of `x` are active: a bool tensor of its shape."""
    return ~(x.abs() < threshold)


def keep_active(x: Tensor, threshold: Tensor) -> Tensor:
    """`x` with its inactive entries set to zero."""
    return torch.where(x.abs() < threshold, 0.0, x)


def _in_memory_order(x: Tensor) -> Tensor:
    """The entries of `x`, [numel], without a copy if they are side by side in any order."""
    in_order = x.permute(sorted(range(x.dim()), key=lambda dim: x.stride(dim), reverse=True))
    return in_order.flatten().contiguous()


def _check_k(x: Tensor, k: int) -> None:
    if not 0 <= k <= x.numel():
        raise ValueError(f"k = {k} is out of range for a tensor of {x.numel()} entries (shape {tuple(x.shape)})")
