"""What a client sends of its trained model (§5, Algorithm 1), and the state and update types everything exchanges."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from zerofl import native
from zerofl.topk import active, count_top_k, top_k_threshold

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


def weights(received: Tensor, trained: Tensor) -> Tensor:
    """The trained weights."""
    return trained


def change(received: Tensor, trained: Tensor) -> Tensor:
    """The change of the weights in local training."""
    return trained - received


class Uplink(NamedTuple):
    """A strategy: of `sends(received, trained)` those entries travel where `ranks(received, trained)` is largest.

    `adds` says whether the server adds them to its model, or takes them.
    """

    sends: Callable[[Tensor, Tensor], Tensor]
    ranks: Callable[[Tensor, Tensor], Tensor]
    adds: bool


UPLINKS = {
    # Vanilla SWAT ("Full Model" in Table 1) sends all of them.
    "full": Uplink(sends=weights, ranks=weights, adds=False),
    # What is not sent counts as zero in the average.
    "top_k_weights": Uplink(sends=weights, ranks=weights, adds=False),
    # The change of the weights that are the top K after training.
    "diff_on_top_k_weights": Uplink(sends=change, ranks=weights, adds=True),
    "top_k_weights_diff": Uplink(sends=change, ranks=change, adds=True),
}


def make_update(
    uplink: str, received: State, trained: State, sparse: Iterable[str], sparsity: float, mask_ratio: float
) -> Update:
    """The client's update after local training (Algorithm 1, "Determine which weights to send").

    Of each tensor named in `sparse` the strategy sends K = ceil((1 - sparsity + mask_ratio) * numel) entries, chosen
    per layer; K reaches the whole layer when mask_ratio >= sparsity, which is vanilla SWAT. Every other tensor is sent
    whole. The states may be on another device, where the choice is made then; the update is on the CPU.

    Raises:
        ValueError: a trained tensor of another type or shape than it was received with.
    """
    sends, ranks, adds = UPLINKS[uplink]
    sparse = set(sparse)
    tensors: dict[str, Tensor | Sparse] = {}
    for name, after in trained.items():
        before = received[name]
        if (after.dtype, after.shape) != (before.dtype, before.shape):
            raise ValueError(
                f"tensor {name!r} came as {before.dtype} {tuple(before.shape)} and is {after.dtype} "
                f"{tuple(after.shape)} after training; give it back as it came"
            )
        if uplink == "full" or not after.is_floating_point():
            tensors[name] = after.cpu()
            continue
        sent = sends(before, after)
        if name in sparse:
            k = count_top_k(after.numel(), sparsity, mask_ratio)
            tensors[name] = keep_largest(sent, sent if ranks is sends else ranks(before, after), k)
        else:
            tensors[name] = sent.cpu()
    return Update(adds, tensors)


def keep_largest(x: Tensor, by: Tensor, k: int) -> Sparse:
    """The entries of float32 `x` where the magnitude of `by`, of the same shape, is among its top k; +0 is left out."""
    threshold = top_k_threshold(by, k)
    if x.device.type != "cpu":
        return sparsified(torch.where(active(by, threshold), x, 0.0))
    return _entries(x, by, threshold.item())


def sparsified(x: Tensor) -> Sparse:
    """The entries of float32 `x` that are not +0, to the bit: -0 is kept."""
    x = x.cpu()
    return _entries(x, x, 0.0)


def _entries(x: Tensor, by: Tensor, threshold: float) -> Sparse:
    x, by = x.contiguous(), by.contiguous()
    find = native.active_entries if native.takes(x, by) else active_entries
    return Sparse(*find(x, by, threshold), x.shape)


def active_entries(x: Tensor, by: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """The bits and values of the entries of `x` that are not +0 and where `by` is not below the threshold.

    Both are contiguous float32 tensors of one shape on the CPU; `zerofl.native.active_entries` is the fast version.
    """
    # numpy takes a quarter of the time of PyTorch's operators here: its large arrays are in huge pages.
    flat, ranks = (t.detach().flatten().numpy() for t in (x, by))
    mask = ~(np.abs(ranks) < np.float32(threshold)) & (flat.view(np.int32) != 0)
    values = flat.take(np.flatnonzero(mask))  # a third of the time of flat[mask]
    return torch.from_numpy(np.packbits(mask)), torch.from_numpy(values)
