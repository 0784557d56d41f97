"""What a client sends of its trained model (§5, Algorithm 1), and the state and update types everything exchanges."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from zerofl.topk import active, count_top_k, keep_active, top_k_threshold

State = dict[str, Tensor]
"""A model's state_dict: float32 parameters and buffers, int64 counters."""


class Sparse(NamedTuple):
    """Some entries of a tensor: a bit for each entry of the flattened tensor, and the values where it is one.

    `bits` is uint8 [ceil(numel / 8)], the first entry in the highest bit (numpy's packbits); `values` [nnz] are in
    row-major order.
    """

    bits: Tensor
    values: Tensor
    shape: torch.Size

    def mask(self) -> np.ndarray:
        """Which entries are there: bool [numel]."""
        return np.unpackbits(self.bits.numpy(), count=self.shape.numel()).view(bool)

    def to_dense(self) -> Tensor:
        """The tensor, with zeros elsewhere."""
        dense = np.zeros(self.shape.numel(), np.float32)
        dense[self.mask()] = self.values.numpy()
        return torch.from_numpy(dense).view(self.shape)


@dataclass(frozen=True)
class Update:
    """What travels from a client to the server: for every tensor of the state its weights, or their change.

    `adds` says which: whether the server adds the average of the floating-point tensors to its own (the Diff
    strategies), or takes it (Top-K-Weights and the full model). Integer counters always travel as they are.
    """

    adds: bool
    tensors: dict[str, Tensor | Sparse]


def full(received: Tensor, trained: Tensor, k: int) -> Tensor:
    """Vanilla SWAT ("Full Model" in Table 1): every weight."""
    return trained


def top_k_weights(received: Tensor, trained: Tensor, k: int) -> Tensor:
    """Top-K-Weights: the top K of the trained weights. What is not sent counts as zero in the average."""
    return keep_active(trained, top_k_threshold(trained, k))


def diff_on_top_k_weights(received: Tensor, trained: Tensor, k: int) -> Tensor:
    """Diff on Top-K-Weights: the change of the weights that are the top K after training."""
    return torch.where(active(trained, top_k_threshold(trained, k)), trained - received, 0.0)


def top_k_weights_diff(received: Tensor, trained: Tensor, k: int) -> Tensor:
    """Top-K-Weights Diff: the top K of the change."""
    change = trained - received
    return keep_active(change, top_k_threshold(change, k))


class Uplink(NamedTuple):
    """A strategy: what it sends of one sparse layer, and whether the server adds it."""

    select: Callable[[Tensor, Tensor, int], Tensor]
    adds: bool


UPLINKS = {
    "full": Uplink(full, adds=False),
    "top_k_weights": Uplink(top_k_weights, adds=False),
    "diff_on_top_k_weights": Uplink(diff_on_top_k_weights, adds=True),
    "top_k_weights_diff": Uplink(top_k_weights_diff, adds=True),
}


def make_update(
    uplink: str, received: State, trained: State, sparse: Iterable[str], sparsity: float, mask_ratio: float
) -> Update:
    """The client's update after local training (Algorithm 1, "Determine which weights to send").

    Of each tensor named in `sparse` the strategy sends K = ceil((1 - sparsity + mask_ratio) * numel) entries, chosen
    per layer; K reaches the whole layer when mask_ratio >= sparsity, which is vanilla SWAT. Every other tensor is sent
    whole. The states may be on another device, where the choice is made then; the update is on the CPU.
    """
    strategy = UPLINKS[uplink]
    sparse = set(sparse)
    tensors: dict[str, Tensor | Sparse] = {}
    for name, after in trained.items():
        before = received[name]
        if uplink == "full" or not after.is_floating_point():
            tensors[name] = after.cpu()
        elif name in sparse:
            k = count_top_k(after.numel(), sparsity, mask_ratio)
            tensors[name] = sparsified(strategy.select(before, after, k))
        else:
            tensors[name] = (after - before if strategy.adds else after).cpu()
    return Update(strategy.adds, tensors)


def sparsified(x: Tensor) -> Sparse:
    """The entries of float32 `x` that are not +0, to the bit: -0 is kept."""
    flat = x.detach().cpu().contiguous().flatten().numpy()
    mask = flat.view(np.int32) != 0
    values = flat.take(np.flatnonzero(mask))  # a third of the time of flat[mask]
    return Sparse(torch.from_numpy(np.packbits(mask)), torch.from_numpy(values), x.shape)
