"""Which samples belong to which client (§4.1): latent Dirichlet allocation, or as the data set says."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from zerofl.data.dataset import Dataset
from zerofl.rng import rng

LEAST_ALPHA, MOST_ALPHA = 1e-6, 1e6
"""Below, a client has one class at a time anyway; above, all clients' shares are the same to a part in a thousand, and
at last a draw overflows."""
ALPHAS = f"a number from {LEAST_ALPHA:g} to {MOST_ALPHA:,.0f}"


def lda_partition(labels: Tensor, clients: int, alpha: float, seed: int) -> list[Tensor]:
    """Each client's sample indices, int64 and rising; every sample belongs to exactly one client (Hsu et al., 2019).

    Each client draws one vector of class probabilities from Dirichlet(alpha) and then its samples one at a time,
    without replacement; an exhausted class gets probability 0 and the rest is renormalised, or if nothing is left of it
    drawn anew. Large alpha (1000) is IID, small alpha is non-IID. Sizes differ by one at most, when the samples do not
    divide by the clients.

    Raises:
        ValueError: more clients than samples, or an alpha outside LEAST_ALPHA to MOST_ALPHA.
    """
    samples = len(labels)
    if not 1 <= clients <= samples:
        raise ValueError(f"clients = {clients}: expected 1 to {samples}, the number of training samples")
    if not LEAST_ALPHA <= alpha <= MOST_ALPHA:
        raise ValueError(f"alpha = {alpha}: expected {ALPHAS}, for example 1.0 (non-IID) or 1000 (IID)")
    generator = rng(seed, 0, 0, "partition")
    classes = int(labels.max()) + 1
    remaining = [generator.permutation(np.flatnonzero(labels.numpy() == c)).tolist() for c in range(classes)]
    parts = []
    for client in range(clients):
        size = samples // clients + (client < samples % clients)
        probabilities = generator.dirichlet(np.full(classes, alpha))
        part: list[int] = []
        while len(part) < size:
            left = np.array([len(samples) > 0 for samples in remaining])
            weights = np.where(left, probabilities, 0.0)
            if not weights.any():
                # A small alpha can put all of a client's mass on exhausted classes: it draws a vector over the others.
                probabilities = np.zeros(classes)
                probabilities[left] = generator.dirichlet(np.full(left.sum(), alpha))
                continue
            cumulative = weights.cumsum() / weights.sum()
            cumulative[np.flatnonzero(weights)[-1] :] = 1.0
            while len(part) < size:
                drawn = int(np.searchsorted(cumulative, generator.random(), side="right"))
                part.append(remaining[drawn].pop())
                if not remaining[drawn]:
                    break  # renormalise
        parts.append(torch.tensor(sorted(part)))
    return parts


def validation_split(indices: Tensor, fraction: float, seed: int, client: int) -> tuple[Tensor, Tensor]:
    """A client's own samples as (training, validation) indices: `fraction` of them is held out (A.5), rounded.

    At least one sample stays for training.
    """
    held_out = held_out_count(len(indices), fraction)
    shuffled = indices[torch.from_numpy(rng(seed, 0, client, "validation").permutation(len(indices)))]
    return shuffled[held_out:].sort().values, shuffled[:held_out].sort().values


def natural_partition(dataset: Dataset, clients: int) -> list[Tensor]:
    """The samples of each of the data set's own clients: its writers or speakers, in the order it gives them.

    Raises:
        ValueError: the data set has no clients of its own, or another number of them.
    """
    if not dataset.clients:
        raise ValueError("partition = 'natural': the data set has no clients of its own; use partition = 'lda'")
    if clients != len(dataset.clients):
        raise ValueError(f"clients = {clients}: with partition = 'natural' this data set has {len(dataset.clients)}")
    return list(dataset.clients.values())


def node_partition(dataset: Dataset, clients: int) -> list[Tensor]:
    """All samples, whichever client it is: on a node whose folder holds its own data only."""
    return [torch.arange(len(dataset.train.labels))] * clients


PARTITIONS: dict[str, Callable[[Dataset, int, float, int], list[Tensor]]] = {
    "lda": lambda dataset, clients, alpha, seed: lda_partition(dataset.train.labels, clients, alpha, seed),
    "natural": lambda dataset, clients, alpha, seed: natural_partition(dataset, clients),
    "node": lambda dataset, clients, alpha, seed: node_partition(dataset, clients),
}
"""The partitions by name: (data set, clients, alpha, seed) -> each client's samples, int64 and rising."""


def held_out_count(samples: int, fraction: float) -> int:
    """How many of a client's samples `validation_split` holds out."""
    return min(round(fraction * samples), samples - 1)
