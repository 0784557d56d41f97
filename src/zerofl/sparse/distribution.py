"""How many weights each sparse layer keeps: the same fraction of each, or other ones at the same total."""

import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import partial

import torch
from torch import Tensor, nn

from zerofl.sparse.sparsify import sparse_layers
from zerofl.sparse.topk import count_top_k, top_k_threshold

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


def global_magnitude(weights: Mapping[str, Tensor], sparsity: float, mask_ratio: float) -> Counts:
    """Of each layer what is among the largest magnitudes of all of them, zeros not counted; at least one entry.

    One threshold for all layers, the K-th largest magnitude of the whole model.
    """
    magnitudes = torch.cat([weight.detach().abs().flatten() for weight in weights.values()])
    threshold = top_k_threshold(magnitudes, count_top_k(len(magnitudes), sparsity, mask_ratio))
    of_layers = torch.split(magnitudes, [weight.numel() for weight in weights.values()])
    kept = torch.stack([(~(of < threshold) & (of != 0)).count_nonzero() for of in of_layers]).tolist()
    return {name: max(1, k) for name, k in zip(weights, kept, strict=True)}


DISTRIBUTIONS: dict[str, Callable[[Mapping[str, Tensor], float, float], Counts]] = {
    "uniform": uniform,
    "erdos_renyi_kernel": erdos_renyi_kernel,
    "global_magnitude": global_magnitude,
}
"""By name, how a model's weights are dealt to its layers: (weights, sparsity, mask ratio) -> K of each layer."""


def deal_sparsity_(model: nn.Module, distribution: str, sparsity: float) -> None:
    """Give each sparse layer of `model` its own sparsity, so that the weights have `sparsity` together.

    By magnitude that is for the weights that the model has now.
    """
    layers = dict(sparse_layers(model))
    counts = DISTRIBUTIONS[distribution]({name: layer.weight for name, layer in layers.items()}, sparsity, 0.0)
    for name, layer in layers.items():
        layer.sparsity = sparsity_with(counts[name], layer.weight.numel())


def keep_dealt_(model: nn.Module, distribution: str, sparsity: float) -> None:
    """`deal_sparsity_` now, or, where that is by magnitude, whenever the model is given weights (`load_state_dict`)."""
    if distribution == "global_magnitude":
        hook = partial(_deal_anew_, distribution=distribution, sparsity=sparsity)
        model.register_load_state_dict_post_hook(hook)  # type: ignore[no-untyped-call]
    elif distribution != "uniform":
        deal_sparsity_(model, distribution, sparsity)


def _deal_anew_(model: nn.Module, incompatible_keys: object, distribution: str, sparsity: float) -> None:
    deal_sparsity_(model, distribution, sparsity)


def sparsity_with(k: int, numel: int) -> float:
    """The sparsity of which `count_top_k` makes exactly `k` of `numel`."""
    sparsity = (numel - k) / numel
    # As a decimal it may lie a little below the fraction, and then K is rounded up to the next number.
    return sparsity if count_top_k(numel, sparsity) == k else math.nextafter(sparsity, 1.0)
