"""What the server may do against updates that are well-formed and finite, but absurd: clip their norms, or trim.

Neither is a proof against clients that mean harm: docs/method.md says what each bounds and what gets through.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from statistics import median_low
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from zerofl.exchange.update import Sparse, State, Update, entries_at

T = TypeVar("T")


class Clip(NamedTuple):
    """The norm of an update's change as it came, and its norm after clipping over that, in [0, 1]."""

    norm: float
    factor: float


def clipped(
    received_of: Callable[[T], State], updates: Iterable[tuple[Update, T]], norm: float, median: float
) -> Iterator[tuple[Update, T, Clip | None]]:
    """The updates, each with what came with it, and with its change clipped; with both bounds 0 as they are, and None.

    The change is that of the entries that were sent (`change_norms`), from the model that the client received, which
    `received_of` tells of what comes with an update. With `median` each
    tensor's is scaled down to `median` times the round's median norm of that tensor: BatchNorm's statistics change by
    other sizes than weights. Of an even number of norms it is the lower of the middle two, so that half of the clients
    may be absurd; what half or more leave as it was stays. Then with `norm` the whole update is scaled down to that
    norm (Sun et al., 2019), over all floating-point tensors.

    Memory: with `median` all updates of the round as they came.
    """
    if not norm and not median:
        for update, of in updates:
            yield update, of, None
            del update  # before the next one is made
        return
    measured: Iterable[tuple[Update, T, dict[str, float]]] = (
        (update, of, change_norms(received_of(of), update)) for update, of in updates
    )
    bounds: dict[str, float] = {}
    if median:
        measured = list(measured)
        names = measured[0][2] if measured else {}
        bounds = {name: median * median_low(norms[name] for *_, norms in measured) for name in names}
    for update, of, norms in measured:
        received = received_of(of)
        floats = [name for name, tensor in received.items() if tensor.is_floating_point()]
        factors = {n: bounds[n] / norms[n] if n in bounds and norms[n] > bounds[n] else 1.0 for n in norms}
        before, kept = (math.hypot(*(f[n] * norms[n] for n in floats)) for f in (dict.fromkeys(norms, 1.0), factors))
        if norm and kept > norm:
            factors = {name: factor * norm / kept for name, factor in factors.items()}
            kept = norm
        yield scaled(received, update, factors), of, Clip(before, kept / before if before else 1.0)


def change_norms(received: State, update: Update) -> dict[str, float]:
    """The Euclidean norm of the change of each tensor that an update stands for, over the entries that it has.

    Of weights it is that of (weights - received). An entry that was not sent is zero in the average, from an honest
    client as from any other; it would be nearly all of the norm of a model's largest tenth.
    """
    return {
        name: math.sqrt(_change(received[name], tensor, update.adds).square_().sum().item())
        for name, tensor in update.tensors.items()
    }


def scaled(received: State, update: Update, factors: Mapping[str, float]) -> Update:
    """The update with the change of each tensor times its factor, in the entries that it has; counters are rounded."""
    tensors = dict(update.tensors)
    for name, tensor in update.tensors.items():
        before, factor = received[name], factors[name]
        if factor == 1:
            continue
        moved = _change(before, tensor, update.adds).mul_(factor)
        if not _is_change(tensor, update.adds):
            moved.add_(_where_sent(before, tensor))
        if not before.is_floating_point():
            moved.round_()
        values = moved.to(before.dtype)
        tensors[name] = tensor._replace(values=values) if isinstance(tensor, Sparse) else values
    return Update(update.adds, tensors)


def _change(before: Tensor, tensor: Tensor | Sparse, adds: bool) -> Tensor:
    """What a tensor that was sent changes, in float64: float32 has no difference of its largest numbers."""
    change = (tensor.values if isinstance(tensor, Sparse) else tensor).double()
    return change.clone() if _is_change(tensor, adds) else change - _where_sent(before, tensor)


def _where_sent(before: Tensor, tensor: Tensor | Sparse) -> Tensor:
    return entries_at(before.contiguous(), tensor.bits) if isinstance(tensor, Sparse) else before


def _is_change(tensor: Tensor | Sparse, adds: bool) -> bool:
    """Whether what was sent is the change itself; integer counters always travel as they are."""
    return adds and (isinstance(tensor, Sparse) or tensor.is_floating_point())


def trimmed_mean(received: State, updates: Iterable[tuple[Update, int]], trim: int, device: str = "cpu") -> State:
    """Of every entry the mean without its `trim` largest and `trim` smallest values (Yin et al., 2018, Definition 2).

    For whole models: of sparse updates an entry that few clients send would be trimmed to nothing. All clients count
    the same, whatever number of samples they say they have. Integer counters are rounded. With no more than 2 `trim`
    updates nothing is left, and the mean is what was received. Memory: 2 `trim` + 2 models, whatever the number of
    updates, if `updates` makes them one at a time; they are on `device`, the result is on the CPU.

    Raises:
        ValueError: an update holds changes.
    """
    sums = {name: torch.zeros(t.shape, dtype=torch.float64, device=device) for name, t in received.items()}
    lowest: dict[str, list[Tensor]] = {name: [] for name in received}
    highest: dict[str, list[Tensor]] = {name: [] for name in received}
    count = 0
    for update, _ in updates:
        if update.adds:
            raise ValueError("an update holds changes: expected whole models, those of the uplink strategy 'full'")
        count += 1
        for name, tensor in update.tensors.items():
            inner = _trim(_whole(tensor).to(device), lowest[name], highest[name], trim)
            if inner is not None:
                sums[name].add_(inner)
    if count <= 2 * trim:
        return dict(received)
    averaged: State = {}
    for name, before in received.items():
        mean = sums.pop(name).div_(count - 2 * trim)
        averaged[name] = (mean if before.is_floating_point() else mean.round_()).to("cpu", before.dtype)
    return averaged


def _trim(value: Tensor, lowest: list[Tensor], highest: list[Tensor], trim: int) -> Tensor | None:
    """Put a tensor's entries among the `trim` lowest and highest so far, if they are.

    Returns those that are none of them, or not any more: there are `trim` below and `trim` above each, so they are in
    the mean whatever comes. None while there are no more than 2 `trim` values.
    """
    for i, low in enumerate(lowest):
        lowest[i], value = torch.minimum(low, value), torch.maximum(low, value)
    if len(lowest) < trim:
        lowest.append(value)
        return None
    for i, high in enumerate(highest):
        highest[i], value = torch.maximum(high, value), torch.minimum(high, value)
    if len(highest) < trim:
        highest.append(value)
        return None
    return value


def _whole(tensor: Tensor | Sparse) -> Tensor:
    """A tensor that was sent, with zeros where nothing was."""
    return tensor.to_dense() if isinstance(tensor, Sparse) else tensor
