"""An exponential mean of the global model over the rounds, which is evaluated in place of the newest one."""

import torch

from zerofl.exchange.aggregate import ServerOptimizer
from zerofl.exchange.update import State

_MEAN, _ROUNDS = "mean.", "mean_rounds"


def with_round_mean(optimizer: ServerOptimizer, decay: float) -> ServerOptimizer:
    """`optimizer`, which in its state keeps the mean of its models w_1 ... w_t too, without a change of its own steps:

    mean_t = (1 - decay) / (1 - decay^t) sum_i decay^(t - i) w_i,

    the bias-corrected exponential mean of Adam's section 7.2 (Kingma & Ba, 2015): its weights add up to one in every
    round, the first mean is the first model, and what the run was initialised with has no part in it. BatchNorm's
    running statistics are averaged with the weights that they are of; integer counters are the newest model's.
    """

    def init(state: State) -> State:
        mean = {f"{_MEAN}{name}": tensor.clone() for name, tensor in state.items()}
        return optimizer.init(state) | mean | {_ROUNDS: torch.tensor(0)}

    def step(state: State, averaged: State, optimizer_state: State) -> tuple[State, State]:
        new_state, inner = optimizer.step(state, averaged, optimizer_state)
        rounds = int(optimizer_state[_ROUNDS]) + 1
        share = (1 - decay) / (1 - decay**rounds)  # of the newest model; the recursive form of the sum above
        mean = {
            f"{_MEAN}{name}": torch.lerp(optimizer_state[f"{_MEAN}{name}"], new, share)
            if new.is_floating_point()
            else new.clone()
            for name, new in new_state.items()
        }
        return new_state, inner | mean | {_ROUNDS: torch.tensor(rounds)}

    return ServerOptimizer(init, step)


def round_mean(optimizer_state: State) -> State:
    """The mean that `with_round_mean` keeps in an optimiser's state, by the model's names; empty if there is none."""
    return {name.removeprefix(_MEAN): t for name, t in optimizer_state.items() if name.startswith(_MEAN)}
