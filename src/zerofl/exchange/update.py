"""What travels: a model's state, some entries of a tensor, and a client's update."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from zerofl.sparse import dispatch, kernels
from zerofl.sparse.topk import active

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

    def positions(self, device: torch.device | str = "cpu") -> Tensor:
        """Which entries are there: int64 [nnz], rising, on a device, where they are found."""
        if torch.device(device).type == "cpu":
            return torch.from_numpy(np.flatnonzero(self.mask()))
        return unpack_on_device(self.bits.to(device), self.shape.numel()).nonzero().flatten()

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


def entries_at(x: Tensor, bits: Tensor) -> Tensor:
    """The entries of a contiguous float32 `x` on the CPU that have a bit, uint8 [ceil(numel / 8)]: float32 [nnz]."""
    if dispatch.takes(x):
        return kernels.entries_at(x, bits, int(np.bitwise_count(bits.numpy()).sum()))
    return x.detach().flatten()[torch.from_numpy(np.unpackbits(bits.numpy(), count=x.numel()).view(bool))]


def add_entries(x: Tensor, sparse: Sparse, weight: float) -> None:
    """Add some entries, times a weight, to a contiguous float32 `x`, in place."""
    if dispatch.takes(x, sparse.values):
        kernels.add_entries(x, sparse.bits, sparse.values, weight)
    else:
        x.view(-1).index_add_(0, sparse.positions(x.device), sparse.values.to(x.device), alpha=weight)


def sparsified(x: Tensor, least: float = 0.0) -> Sparse:
    """The entries of float32 `x` on the CPU that are not +0, to the bit (-0 is kept), and not below a magnitude."""
    return entries(x, x, torch.tensor(least, dtype=x.dtype, device=x.device))


def entries(x: Tensor, by: Tensor, threshold: Tensor) -> Sparse:
    """The entries of float32 `x` that are not +0 and where the magnitude of `by` is not below the threshold.

    All are on one device, where the entries are found; those alone are copied to the CPU.
    """
    x, by = x.contiguous(), by.contiguous()
    if x.device.type != "cpu":
        bits, values = active_entries_on_device(x, by, threshold)
        return Sparse(bits.cpu(), values.cpu(), x.shape)
    find = kernels.active_entries if dispatch.takes(x, by) else active_entries
    return Sparse(*find(x, by, threshold.item()), x.shape)


def active_entries(x: Tensor, by: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """The bits and values of the entries of `x` that are not +0 and where `by` is not below the threshold.

    Both are contiguous float32 tensors of one shape on the CPU; the kernels' `active_entries` is the fast version.
    """
    # numpy takes a quarter of the time of PyTorch's operators here: its large arrays are in huge pages.
    flat, ranks = (t.detach().flatten().numpy() for t in (x, by))
    mask = ~(np.abs(ranks) < np.float32(threshold)) & (flat.view(np.int32) != 0)
    values = flat.take(np.flatnonzero(mask))  # a third of the time of flat[mask]
    return torch.from_numpy(np.packbits(mask)), torch.from_numpy(values)


def active_entries_on_device(x: Tensor, by: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """`active_entries` in operations of PyTorch alone, on the device of all three."""
    mask = (active(by, threshold) & (x.view(torch.int32) != 0)).flatten()
    padded = F.pad(mask.to(torch.uint8), (0, -len(mask) % 8)).view(-1, 8)
    return (padded << _shifts(x.device)).sum(1, dtype=torch.uint8), x.flatten()[mask]


def unpack_on_device(bits: Tensor, numel: int) -> Tensor:
    """Of `Sparse.bits` a number for each entry, 0 or 1, [numel], in operations of PyTorch alone."""
    return ((bits[:, None] >> _shifts(bits.device)) & 1).flatten()[:numel]


def _shifts(device: torch.device) -> Tensor:
    """By which a byte is shifted for the bit of each of its eight entries."""
    return torch.arange(7, -1, -1, dtype=torch.uint8, device=device)
