"""The sample-weighted average of the updates (Algorithm 1), and the server optimiser's step with it."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from zerofl.exchange.update import Sparse, State, Update, add_entries

# A power of two, so that it changes no digit of floats above 1e-23. With it the sums of 65,536 clients' largest floats,
# weighted with up to 2^32 samples each, stay finite.
_SCALE = 2.0**-48


def average(received: State, updates: Iterable[tuple[Update, int]], device: str = "cpu") -> State:
    """The server's average of the updates, sum (n_k / n) update_k, each with its client's number of samples n_k.

    Entries that nobody sent are zero, or where the updates are changes as they were `received`. Integer counters are
    rounded. The average of no update is what was received. The sums are float32 and in the order of the updates, which
    makes them reproducible; they are made on `device`, the result is on the CPU. Memory: one model for the sums, which
    becomes the result, and one update at a time, if `updates` makes them one at a time.

    Raises:
        ValueError: the updates of some clients are weights, and those of others changes.
    """
    examples, adds = 0, False
    sums = {
        name: torch.zeros(t.shape, dtype=t.dtype if t.is_floating_point() else torch.float64, device=device)
        for name, t in received.items()
    }
    for update, num_examples in updates:
        if examples and update.adds != adds:
            raise ValueError("some updates hold weights and others changes: expected those of one uplink strategy")
        adds = update.adds
        examples += num_examples
        _add(sums, update, num_examples * _SCALE)
        del update  # before the next one is made
    if not examples:
        return dict(received)
    averaged: State = {}
    for name, before in received.items():
        total = sums.pop(name)
        mean = total.double().div_(examples * _SCALE)
        if not before.is_floating_point():
            averaged[name] = mean.round_().to("cpu", before.dtype)
        else:
            averaged[name] = total.copy_(mean.add_(before.to(device)) if adds else mean).cpu()  # no second model
    return averaged


def _add(sums: State, update: Update, weight: float) -> None:
    """Add an update times its weight to the sums, in place."""
    for name, tensor in update.tensors.items():
        total = sums[name]
        if isinstance(tensor, Sparse):
            add_entries(total, tensor, weight)
        else:
            total.add_(tensor.to(total.device), alpha=weight)


class ServerOptimizer(NamedTuple):
    """How the server moves from its state to the next one, as two pure functions.

    `init(state)` gives the optimiser's own state; `step(state, averaged, optimizer_state)` gives the next model and
    optimiser state.
    """

    init: Callable[[State], State]
    step: Callable[[State, State, State], tuple[State, State]]


def fedavg() -> ServerOptimizer:
    """FedAvg (McMahan et al., 2017): the average is the next model."""
    return ServerOptimizer(init=lambda state: {}, step=lambda state, averaged, optimizer_state: (averaged, {}))


def fedavgm(parameters: list[str], lr: float, beta: float) -> ServerOptimizer:
    """FedAvgM (Hsu et al., 2019), with the average's change d for `parameters`: m = beta m + d;  w = w + lr m.

    From m = 0; with lr 1 and beta 0 it is FedAvg. Where the average is zero, as Top-K-Weights leaves what nobody sent,
    m and w are zero too, which is not Hsu's: the model stays as sparse as it is without momentum, and as cheap to send.
    Every other tensor takes its averaged value, as in `fedadam`.
    """

    def init(state: State) -> State:
        return {f"m.{name}": torch.zeros_like(state[name]) for name in parameters}

    def step(state: State, averaged: State, optimizer_state: State) -> tuple[State, State]:
        new_state, moments = dict(averaged), State()
        for name in parameters:
            m = beta * optimizer_state[f"m.{name}"] + averaged[name] - state[name]
            nobody = averaged[name] == 0
            new_state[name] = (state[name] + lr * m).masked_fill_(nobody, 0)
            moments[f"m.{name}"] = m.masked_fill_(nobody, 0)
        return new_state, moments

    return ServerOptimizer(init, step)


def fedadam(
    parameters: list[str], lr: float, beta_1: float, beta_2: float, tau: float, *, keep_zeros: bool = False
) -> ServerOptimizer:
    """FedAdam (Reddi et al., 2021, Algorithm 2), with the average's change d as the pseudo-gradient, for `parameters`:

    m = beta_1 m + (1 - beta_1) d;   v = beta_2 v + (1 - beta_2) d^2;   w = w + lr m / (sqrt(v) + tau),

    from m = 0 and v = tau^2, the least that Algorithm 2 allows: from v = 0 the first steps would be longer than later
    ones with the same change.

    `parameters` names the trained tensors. Every other one, BatchNorm's running statistics and integer counters, takes
    its averaged value: "optimising" a variance can make it negative.

    With `keep_zeros`, which is not Reddi et al.'s, w is zero where the average is, as in `fedavgm`, and there m and v
    are as in the beginning.
    """

    def init(state: State) -> State:
        moments = {f"m.{name}": torch.zeros_like(state[name]) for name in parameters}
        return moments | {f"v.{name}": torch.full_like(state[name], tau**2) for name in parameters}

    def step(state: State, averaged: State, optimizer_state: State) -> tuple[State, State]:
        new_state, moments = dict(averaged), State()
        for name in parameters:
            change = averaged[name] - state[name]
            m = beta_1 * optimizer_state[f"m.{name}"] + (1 - beta_1) * change
            v = beta_2 * optimizer_state[f"v.{name}"] + (1 - beta_2) * change**2
            v.clamp_(max=torch.finfo(v.dtype).max)  # not infinity, from which no checkpoint resumes
            w = state[name] + lr * m / (v.sqrt() + tau)
            if keep_zeros:
                nobody = averaged[name] == 0
                w, m, v = w.masked_fill(nobody, 0), m.masked_fill(nobody, 0), v.masked_fill(nobody, tau**2)
            new_state[name] = w
            moments |= {f"m.{name}": m, f"v.{name}": v}
        return new_state, moments

    return ServerOptimizer(init, step)


def nonzero_ratio(tensor: Tensor) -> float:
    """Non-zero entries over all entries: Figure 2's measure of how far the clients' masks overlap."""
    return tensor.count_nonzero().item() / tensor.numel()
