"""What travels: a model's state, some entries of a tensor, and a client's update."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from zerofl.sparse import dispatch, kernels

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


def sparsified(x: Tensor) -> Sparse:
    """The entries of float32 `x` that are not +0, to the bit: -0 is kept."""
    x = x.cpu()
    return entries(x, x, 0.0)


def entries(x: Tensor, by: Tensor, threshold: float) -> Sparse:
    """The entries of float32 `x` that are not +0 and where the magnitude of `by` is not below the threshold."""
    x, by = x.contiguous(), by.contiguous()
    find = kernels.active_entries if dispatch.takes(x, by) else active_entries
    return Sparse(*find(x, by, threshold), x.shape)


def active_entries(x: Tensor, by: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """The bits and values of the entries of `x` that are not +0 and where `by` is not below the threshold.

    Both are contiguous float32 tensors of one shape on the CPU; the kernels' `active_entries` is the fast version.
    """
    # numpy takes a quarter of the time of PyTorch's operators here: its large arrays are in huge pages.
    flat, ranks = (t.detach().flatten().numpy() for t in (x, by))
    mask = ~(np.abs(ranks) < np.float32(threshold)) & (flat.view(np.int32) != 0)
    values = flat.take(np.flatnonzero(mask))  # a third of the time of flat[mask]
    return torch.from_numpy(np.packbits(mask)), torch.from_numpy(values)
