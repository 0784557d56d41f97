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

from zerofl.sparse import cuda_select, kernels
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
        found = kernels.top_k_threshold(cuda_select.in_memory_order(x).flatten().contiguous(), k)
        return torch.tensor(found, dtype=x.dtype, device=x.device)  # whatever the defaults are
    if x.device.type != "cpu":
        return cuda_select.kth_magnitude(x, k)[0] if cuda_select.takes(x) else kth_by_torch_topk(x, k)
    magnitudes = x.detach().abs().flatten()
    kth_smallest = magnitudes.numel() - k
    # numpy's vectorised partition, in place on our copy, takes a tenth of the time of torch.kthvalue; it has no
    # half-precision types, which float32 holds exactly.
    exact = (magnitudes if x.dtype in (torch.float32, torch.float64) else magnitudes.float()).numpy()
    exact.partition(kth_smallest)
    return torch.tensor(exact[kth_smallest], dtype=x.dtype, device=x.device)


def top_k(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`top_k_threshold`, and `count_active` with it; scalars on the device of `x`."""
    if k and cuda_select.takes(x):
        return cuda_select.kth_magnitude(x, k)
    threshold = top_k_threshold(x, k)
    return threshold, count_active(x, threshold)


def top_k_threshold_by_sorting(x: Tensor, k: int) -> Tensor:
    """The K-th largest magnitude in `x`, as one reads it in §3.1: sort by magnitude and take the K-th."""
    _check_k(x, k)
    if k == 0:
        return x.new_full((), math.inf)
    return x.detach().abs().flatten().sort(descending=True).values[k - 1]


def kth_by_torch_topk(x: Tensor, k: int) -> Tensor:
    """The K-th largest magnitude, 1 <= k, for devices on which neither our kernels nor numpy's selection run.

    The least of the K largest, in which NaN counts as the largest. Nothing waits for the device.
    """
    largest = x.detach().abs().flatten().topk(k, sorted=False).values
    is_nan = largest.isnan()
    return torch.where(is_nan.all(), math.nan, torch.where(is_nan, math.inf, largest).amin())


def active(x: Tensor, threshold: Tensor | float) -> Tensor:
    """Which entries of `x` are active: a bool tensor of its shape."""
    return ~(x.abs() < threshold)


def count_active(x: Tensor, threshold: Tensor) -> Tensor:
    """How many entries of `x` are active and not zero, which are those that a product multiplies by.

    There are fewer than K where fewer are not zero. On a GPU a threshold that is NaN counts the zeros too.
    """
    if x.device.type == "cpu" and threshold > 0:  # then no zero is active
        return active(x.detach(), threshold).count_nonzero()
    return keep_active(x.detach(), threshold).count_nonzero()


def keep_active(x: Tensor, threshold: Tensor) -> Tensor:
    """`x` with its inactive entries set to zero."""
    if cuda_select.takes(x) and (threshold.dtype, threshold.device) == (x.dtype, x.device):
        return cuda_select.keep_active(x, threshold)
    return torch.where(x.abs() < threshold, 0.0, x)


def _check_k(x: Tensor, k: int) -> None:
    if not 0 <= k <= x.numel():
        raise ValueError(f"k = {k} is out of range for a tensor of {x.numel()} entries (shape {tuple(x.shape)})")
