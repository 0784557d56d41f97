"""The mean of the global model over rounds, against sums written out."""

import pytest
import torch

from zerofl.exchange.aggregate import fedadam, fedavg
from zerofl.exchange.round_mean import round_mean, with_round_mean
from zerofl.exchange.update import State

ROUNDS = [(8.0, 2.0, 3), (-4.0, 1.0, 6), (16.0, 4.0, 9)]
"""A weight, a running variance and a counter after each round."""


def state_of(w: float, running_var: float, n: int) -> State:
    return {"w": torch.tensor([w]), "running_var": torch.tensor([running_var]), "n": torch.tensor(n)}


def test_three_rounds_equal_the_sum_by_hand_and_the_model_goes_on_as_without_it() -> None:
    optimizer = with_round_mean(fedavg(), decay=0.5)
    state = state_of(1000.0, 1000.0, 0)  # what the run starts from has no part in the mean
    kept, means = optimizer.init(state), []
    for of in ROUNDS:
        state, kept = optimizer.step(state, state_of(*of), kept)
        assert [t.item() for t in state.values()] == list(of)
        means.append([t.item() for t in round_mean(kept).values()])
    # Weights 1; 1/3, 2/3; 1/7, 2/7, 4/7, which is 0.5^(t - i) over its sum.
    by_hand = [
        (8.0, 2.0, 3),
        ((8 - 2 * 4) / 3, (2 + 2 * 1) / 3, 6),
        ((8 - 2 * 4 + 4 * 16) / 7, (2 + 2 * 1 + 4 * 4) / 7, 9),
    ]
    for mean, expected in zip(means, by_hand, strict=True):
        assert mean == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert round_mean(kept)["n"].dtype == torch.int64


def test_it_stands_beside_the_optimisers_own_tensors() -> None:
    plain = fedadam(["w"], lr=0.1, beta_1=0.9, beta_2=0.99, tau=1e-3)
    both = with_round_mean(plain, decay=0.9)
    state, averaged = state_of(1.0, 2.0, 1), state_of(2.0, 0.5, 4)
    expected, moments = plain.step(state, averaged, plain.init(state))
    found, kept = both.step(state, averaged, both.init(state))
    assert found == expected
    assert {name: t for name, t in kept.items() if not name.startswith("mean")} == moments
    assert round_mean(kept) == expected  # after one round
    assert round_mean(moments) == {}
