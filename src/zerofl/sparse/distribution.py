"""How many weights each sparse layer keeps: the same fraction of each, or other ones at the same total."""

import math
from collections.abc import Callable, Mapping
from fractions import Fraction

from torch import Tensor

from zerofl.sparse.topk import count_top_k

Counts = dict[str, int]


def uniform(weights: Mapping[str, Tensor], sparsity: float, mask_ratio: float) -> Counts:
    """K of each layer as the paper has it (SWAT-U)."""
    return {name: count_top_k(weight.numel(), sparsity, mask_ratio) for name, weight in weights.items()}


def erdos_renyi_kernel(weights: Mapping[str, Tensor], sparsity: float, mask_ratio: float) -> Counts:
    """Densities in proportion to (sum of the weight's dimensions) / (their product), as Evci et al. (2020) deal them.

    The factor is such that the total is that of `uniform`. A layer that would get more than it has is kept whole, and
    the others share what that leaves over. Exact in fractions, so the same everywhere.
    """
    whole: set[str] = set()
    budget = (1 - Fraction(str(sparsity)) + Fraction(str(mask_ratio))) * sum(w.numel() for w in weights.values())
    while True:
        shared = {name: sum(weight.shape) for name, weight in weights.items() if name not in whole}
        left = budget - sum(weights[name].numel() for name in whole)
        factor = left / sum(shared.values()) if shared else Fraction(0)
        full = {name for name, dimensions in shared.items() if factor * dimensions >= weights[name].numel()}
        if not full:
            break
        whole |= full
    return {
        name: weight.numel() if name in whole else max(1, math.ceil(factor * shared[name]))
        for name, weight in weights.items()
    }


DISTRIBUTIONS: dict[str, Callable[[Mapping[str, Tensor], float, float], Counts]] = {
    "uniform": uniform,
    "erdos_renyi_kernel": erdos_renyi_kernel,
}
"""By name, how a model's weights are dealt to its layers: (weights, sparsity, mask ratio) -> K of each layer."""


def sparsity_by_layer(weights: Mapping[str, Tensor], distribution: str, sparsity: float) -> dict[str, float]:
    """The sparsity of each layer, of the names in DISTRIBUTIONS, with which the weights have `sparsity` together."""
    if distribution == "uniform":
        return dict.fromkeys(weights, sparsity)
    counts = DISTRIBUTIONS[distribution](weights, sparsity, 0.0)
    return {name: sparsity_with(counts[name], w.numel()) if w.numel() else sparsity for name, w in weights.items()}


def sparsity_with(k: int, numel: int) -> float:
    """The sparsity of which `count_top_k` makes exactly `k` of `numel`."""
    sparsity = (numel - k) / numel
    # As a decimal it may lie a little below the fraction, and then K is rounded up to the next number.
    return sparsity if count_top_k(numel, sparsity) == k else math.nextafter(sparsity, 1.0)
