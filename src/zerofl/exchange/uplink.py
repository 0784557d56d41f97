"""Which part of its trained model a client sends (§5, Algorithm 1)."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from zerofl.exchange.update import Sparse, State, Update, entries
from zerofl.exchange.wrappers import differing_names
from zerofl.sparse.distribution import DISTRIBUTIONS
from zerofl.sparse.topk import top_k_threshold


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
"""The strategies by name: the paper's three (§5), and vanilla SWAT's."""


def make_update(
    uplink: str,
    received: State,
    trained: State,
    sparse: Iterable[str],
    sparsity: float,
    mask_ratio: float,
    distribution: str = "uniform",
) -> Update:
    """The client's update after local training (Algorithm 1, "Determine which weights to send").

    Of each tensor named in `sparse` the strategy sends K = ceil((1 - sparsity + mask_ratio) * numel) entries, chosen
    per layer; K reaches the whole layer when mask_ratio >= sparsity, which is vanilla SWAT. Another `distribution`, a
    name in `zerofl.sparse.distribution`, deals the same total to the layers in its way. Every other tensor is sent
    whole. The states may be on another device, where the choice is made then; the update is on the CPU.

    The names of a `tied` parameter get the same entries, one object for all of them: sparse if `sparse` has any.

    Raises:
        ValueError: other names than were received, a trained tensor of another type or shape, or one of another
            floating-point type than float32; or as `tied`.
    """
    sends, ranks, adds = UPLINKS[uplink]
    if trained.keys() != received.keys():
        raise ValueError(f"the model after training {differing_names(trained, received)}")
    for name, after in trained.items():
        before = received[name]
        if (after.dtype, after.shape) != (before.dtype, before.shape):
            raise ValueError(
                f"tensor {name!r} came as {before.dtype} {tuple(before.shape)} and is {after.dtype} "
                f"{tuple(after.shape)} after training; give it back as it came"
            )
        if after.is_floating_point() and after.dtype != torch.float32:
            raise ValueError(
                f"tensor {name!r} is {after.dtype}: only float32 can be sent; model.float() makes it float32"
            )
    first_of = tied(received, trained)
    sparse = {first_of.get(name, name) for name in sparse}
    chosen = {name: after for name, after in trained.items() if name in sparse}
    counts = DISTRIBUTIONS[distribution](chosen, sparsity, mask_ratio)
    tensors: dict[str, Tensor | Sparse] = {}
    for name, after in trained.items():
        if (first := first_of[name]) != name:
            tensors[name] = tensors[first]
            continue
        before = received[name]
        if uplink == "full" or not after.is_floating_point():
            tensors[name] = after.cpu()
            continue
        if name in sparse:
            rank = ranks(before, after)
            tensors[name] = keep_largest(rank if ranks is sends else sends(before, after), rank, counts[name])
        else:
            tensors[name] = sends(before, after).cpu()
    return Update(adds, tensors)


def tied(received: State, trained: State) -> dict[str, str]:
    """Each name of a model's state with the first name of the same parameter: itself, unless weights are tied.

    With `decoder.weight = encoder.weight` a state has one parameter under two names, and nothing in the arrays that
    came tells so. Chosen by itself, as a sparse layer's weight and as a dense one's, or rounded by itself to int8, it
    would end with two values. Here two floating-point tensors of two or more dimensions count as one where they are
    equal as they were received *and* after training. Equal at the start alone can be two copies, which training takes
    apart. Two tensors that are equal both times without being tied (layers frozen at zero) take no harm: the same
    entries of them are the right ones to send. Biases and counters always travel whole, so they stay equal by
    themselves.

    Raises:
        ValueError: two are equal after training, and not all one number, but came with different values: then they are
            one parameter of which the server has two values, and no change of it is right for both.
    """
    first_of: dict[str, str] = {}
    firsts: dict[tuple[torch.dtype, torch.Size], list[str]] = {}
    for name, after in trained.items():
        first_of[name] = name
        if after.dim() < 2 or not after.is_floating_point():
            continue
        same_shape = firsts.setdefault((after.dtype, after.shape), [])
        for first in same_shape:
            if not torch.equal(after, trained[first]):
                continue
            if torch.equal(received[name], received[first]):
                first_of[name] = first
            elif bool((after != after.flatten()[0]).any()):
                raise ValueError(
                    f"{first!r} and {name!r} came with different values and are the same after training, as tied "
                    "weights are: give both the same value in the model that the server sends, for example the "
                    "state_dict of the model with its weights tied, or send one of them only"
                )
            break
        else:
            same_shape.append(name)
    return first_of


def keep_largest(x: Tensor, by: Tensor, k: int) -> Sparse:
    """The entries of float32 `x` where the magnitude of `by`, of the same shape, is among its top k; +0 is left out."""
    return entries(x, by, top_k_threshold(by, k))
