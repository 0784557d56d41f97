"""The server's arithmetic, and two rounds of every strategy with every server optimiser, against plain Python lists."""

import math
from typing import Any

import pytest
import torch

from zerofl.exchange.aggregate import ServerOptimizer, average, fedadam, fedavg, fedavgm, nonzero_ratio
from zerofl.exchange.update import State, Update, sparsified
from zerofl.exchange.uplink import UPLINKS, make_update
from zerofl.exchange.wire import decode, encode, schema_of
from zerofl.experiment import SERVER_OPTIMIZERS


def test_weights_are_averaged_by_samples_and_absent_entries_count_as_zero() -> None:
    received = {"w": torch.tensor([9.0, 9.0, 9.0])}
    one = Update(False, {"w": sparsified(torch.tensor([4.0, 0.0, 1.0]))})
    other = Update(False, {"w": torch.tensor([8.0, 4.0, 0.0])})
    averaged = average(received, [(one, 1), (other, 3)])
    assert averaged["w"].tolist() == [(4 + 3 * 8) / 4, 3 * 4 / 4, 1 / 4]


def test_changes_are_added_and_absent_entries_stay() -> None:
    received = {"w": torch.tensor([9.0, 9.0, 9.0])}
    changes = [Update(True, {"w": sparsified(torch.tensor(change))}) for change in ([4.0, 0.0, 0.0], [8.0, 4.0, 0.0])]
    averaged = average(received, zip(changes, (1, 3), strict=True))
    assert averaged["w"].tolist() == [9 + 7, 9 + 3, 9]
    assert received["w"].tolist() == [9, 9, 9]


def test_without_an_update_nothing_changes() -> None:
    received = {"w": torch.tensor([9.0, 9.0, 9.0])}
    assert average(received, []) == received


def test_weights_and_changes_do_not_mix() -> None:
    updates = [(Update(adds, {"w": torch.tensor([1.0])}), 1) for adds in (True, False)]
    with pytest.raises(ValueError, match="some updates hold weights and others changes"):
        average({"w": torch.tensor([9.0])}, updates)


@pytest.mark.parametrize("adds", [False, True])
def test_integer_counters_are_averaged_and_stay_integers(adds: bool) -> None:
    updates = [(Update(adds, {"n": torch.tensor(count)}), examples) for count, examples in ((3, 1), (6, 3))]
    n = average({"n": torch.tensor(10)}, updates)["n"]  # 21 / 4 = 5.25
    assert (n.dtype, n.item()) == (torch.int64, 5)


def test_the_largest_floats_do_not_overflow() -> None:
    largest = torch.finfo(torch.float32).max
    updates = [(Update(False, {"w": torch.tensor([largest])}), 2**32 - 1)] * 3
    assert average({"w": torch.tensor([0.0])}, updates)["w"].item() == largest


def test_fedadam_leaves_buffers_and_counters_to_the_average() -> None:
    state = {"w": torch.tensor([1.0]), "running_var": torch.tensor([2.0]), "n": torch.tensor(1)}
    averaged = {"w": torch.tensor([2.0]), "running_var": torch.tensor([0.5]), "n": torch.tensor(4)}
    optimizer = fedadam(["w"], lr=0.1, beta_1=0.9, beta_2=0.99, tau=1e-3)
    new_state, moments = optimizer.step(state, averaged, optimizer.init(state))
    assert (new_state["running_var"].item(), new_state["n"].item()) == (0.5, 4)
    assert new_state["n"].dtype == torch.int64
    assert moments.keys() == {"m.w", "v.w"}
    # d = 1, m = 0.1, v = 0.01, w = 1 + 0.1 * 0.1 / (0.1 + 0.001)
    torch.testing.assert_close(new_state["w"], torch.tensor([1 + 0.01 / 0.101]))


def test_an_absurd_change_leaves_fedadam_with_moments_that_can_be_stored() -> None:
    state: State = {"w": torch.tensor([1.0, 1.0])}
    optimizer = fedadam(["w"], lr=0.1, beta_1=0.9, beta_2=0.99, tau=1e-3)
    moments = optimizer.init(state)
    for _ in range(2):
        state, moments = optimizer.step(state, {"w": torch.tensor([1e30, 2.0])}, moments)
        assert all(tensor.isfinite().all() for tensor in (*state.values(), *moments.values()))
    assert state["w"][1] > 1.01


def test_fedavgm_by_hand_and_without_momentum() -> None:
    state: State = {"w": torch.tensor([0.0]), "running_var": torch.tensor([2.0]), "n": torch.tensor(1)}
    averaged: State = {"w": torch.tensor([1.0]), "running_var": torch.tensor([0.5]), "n": torch.tensor(4)}
    optimizer = fedavgm(["w"], lr=1.0, beta=0.9)
    first, moments = optimizer.step(state, averaged, optimizer.init(state))
    second, _ = optimizer.step(first, {**averaged, "w": torch.tensor([2.0])}, moments)
    # Both changes are 1: m = 1, then 0.9 + 1 = 1.9, so w = 1 and then 2.9.
    assert first["w"].item() == 1.0
    torch.testing.assert_close(second["w"], torch.tensor([2.9]))
    assert (first["running_var"].item(), first["n"].item(), first["n"].dtype) == (0.5, 4, torch.int64)
    plain = fedavgm(["w"], lr=1.0, beta=0.0)
    assert plain.step(state, averaged, plain.init(state))[0]["w"].item() == averaged["w"].item()


def test_fedavgm_leaves_zero_what_nobody_sent() -> None:
    optimizer = fedavgm(["w"], lr=0.5, beta=0.9)
    state: State = {"w": torch.tensor([2.0, -4.0, 0.0])}
    first, moments = optimizer.step(state, {"w": torch.tensor([3.0, 0.0, 0.0])}, optimizer.init(state))
    assert first["w"].tolist() == [2.5, 0.0, 0.0]
    assert moments["m.w"].tolist() == [1.0, 0.0, 0.0]
    # +0, which costs nothing on the wire; and what comes back begins without momentum: 0 + 0.5 * 6.
    assert not torch.signbit(first["w"]).any()
    second, _ = optimizer.step(first, {"w": torch.tensor([0.0, 6.0, 0.0])}, moments)
    assert second["w"].tolist() == [0.0, 3.0, 0.0]


def test_sparse_fedadam_leaves_zero_what_nobody_sent() -> None:
    optimizer = fedadam(["w"], lr=0.1, beta_1=0.9, beta_2=0.99, tau=1e-3, keep_zeros=True)
    state: State = {"w": torch.tensor([2.0, -4.0])}
    first, moments = optimizer.step(state, {"w": torch.tensor([2.0, 0.0])}, optimizer.init(state))
    assert first["w"].tolist() == [2.0, 0.0]
    assert not torch.signbit(first["w"]).any()  # +0, which costs nothing on the wire
    # What comes back begins anew: with d = tau from v = tau^2, m = 0.1 tau and the step is lr 0.05.
    second, _ = optimizer.step(first, {"w": torch.tensor([0.0, 1e-3])}, moments)
    assert second["w"].tolist() == pytest.approx([0.0, 0.05 * 0.1])


def test_nonzero_ratio() -> None:
    assert nonzero_ratio(torch.tensor([[0.0, 1.0], [-2.0, 0.0]])) == 0.5


def test_fedadams_first_step_is_not_longer_than_a_later_one_with_the_same_change() -> None:
    # A change of tau from v = tau^2: v stays tau^2, m = 0.1 tau, and the step is lr 0.1 tau / (tau + tau) = 0.05 lr.
    optimizer = fedadam(["w"], lr=0.1, beta_1=0.9, beta_2=0.99, tau=1e-3)
    state: State = {"w": torch.zeros(3)}
    averaged: State = {"w": torch.full((3,), 1e-3)}
    stepped, _ = optimizer.step(state, averaged, optimizer.init(state))
    torch.testing.assert_close(stepped["w"], torch.full((3,), 0.05 * 0.1))


# Two clients with 10 and 30 samples; "training" adds a fixed change that depends on the client and the round. A layer
# of four weights at sparsity 0.5 and mask ratio 0 sends K = 2; the bias is a dense layer.
SAMPLES = (10, 30)
CHANGES = {
    (1, 0): [1.0, -4.0, 0.25, 0.5],
    (1, 1): [-3.0, 0.5, 2.0, 0.25],
    (2, 0): [0.5, 0.25, -6.0, 1.0],
    (2, 1): [2.0, 0.75, 0.5, -5.0],
}
BIAS_CHANGE = {(1, 0): 1.0, (1, 1): 2.0, (2, 0): -1.0, (2, 1): 0.5}
START = [1.0, 2.125, -3.0, 0.5]
ADAM: dict[str, Any] = {"lr": 0.1, "beta_1": 0.9, "beta_2": 0.99, "tau": 1e-3}


def two_largest(values: list[float]) -> set[int]:
    assert len({abs(value) for value in values}) == 4, "the figures are chosen without ties"
    return set(sorted(range(4), key=lambda i: -abs(values[i]))[:2])


def sent_by_hand(uplink: str, received: list[float], trained: list[float]) -> list[float]:
    change = [t - r for t, r in zip(trained, received, strict=True)]
    if uplink == "full":
        return trained
    if uplink == "top_k_weights":
        return [trained[i] if i in two_largest(trained) else 0.0 for i in range(4)]
    mask = two_largest(trained if uplink == "diff_on_top_k_weights" else change)
    return [change[i] if i in mask else 0.0 for i in range(4)]


def rounds_by_hand(uplink: str, server: str) -> tuple[list[float], float]:
    w, b, adds = START, 0.0, uplink in ("diff_on_top_k_weights", "top_k_weights_diff")
    moments = [[0.0, 1e-3**2] for _ in range(5)]  # m = 0 and v = tau^2: Algorithm 2 of Reddi et al. asks for v >= tau^2
    for round in (1, 2):
        sent = [
            sent_by_hand(uplink, w, [x + d for x, d in zip(w, CHANGES[round, client], strict=True)])
            for client in (0, 1)
        ]
        mean = [(SAMPLES[0] * sent[0][i] + SAMPLES[1] * sent[1][i]) / 40 for i in range(4)]
        averaged = [x + m for x, m in zip(w, mean, strict=True)] if adds else mean
        averaged_bias = b + (SAMPLES[0] * BIAS_CHANGE[round, 0] + SAMPLES[1] * BIAS_CHANGE[round, 1]) / 40
        if server == "fedavg":
            w, b = averaged, averaged_bias
            continue
        if server == "fedavgm":
            for i, (old, new) in enumerate(zip([*w, b], [*averaged, averaged_bias], strict=True)):
                moments[i][0] = 0.5 * moments[i][0] + new - old if new else 0.0
            kept = [x if new else 0.0 for x, new in zip(w, averaged, strict=True)]
            w, b = [x + 0.8 * m for x, (m, _) in zip(kept, moments[:4], strict=True)], b + 0.8 * moments[4][0]
            continue
        stepped = []
        for old, new, moment in zip([*w, b], [*averaged, averaged_bias], moments, strict=True):
            moment[0] = 0.9 * moment[0] + 0.1 * (new - old)
            moment[1] = 0.99 * moment[1] + 0.01 * (new - old) ** 2
            stepped.append(old + 0.1 * moment[0] / (math.sqrt(moment[1]) + 1e-3))
        if server == "fedadam_sparse":
            for i, new in enumerate(averaged):
                if new == 0:
                    stepped[i], moments[i] = 0.0, [0.0, 1e-3**2]
        w, b = stepped[:4], stepped[4]
    return w, b


@pytest.mark.parametrize("server", SERVER_OPTIMIZERS)
@pytest.mark.parametrize("uplink", UPLINKS)
def test_two_rounds_over_the_wire_equal_hand_arithmetic(uplink: str, server: str) -> None:
    state: State = {"w": torch.tensor(START).view(2, 2), "b": torch.tensor([0.0])}
    schema = schema_of(state)
    optimizers: dict[str, ServerOptimizer] = {
        "fedavg": fedavg(),
        "fedavgm": fedavgm(["w", "b"], lr=0.8, beta=0.5),
        "fedadam": fedadam(["w", "b"], **ADAM),
        "fedadam_sparse": fedadam(["w", "b"], keep_zeros=True, **ADAM),
    }
    optimizer = optimizers[server]
    optimizer_state = optimizer.init(state)
    for round in (1, 2):
        updates = []
        for client, samples in enumerate(SAMPLES):
            trained = {
                "w": state["w"] + torch.tensor(CHANGES[round, client]).view(2, 2),
                "b": state["b"] + BIAS_CHANGE[round, client],
            }
            update = make_update(uplink, state, trained, ["w"], sparsity=0.5, mask_ratio=0.0)
            updates.append((decode(encode(update, schema), schema), samples))
        state, optimizer_state = optimizer.step(state, average(state, updates), optimizer_state)
    w, b = rounds_by_hand(uplink, server)
    torch.testing.assert_close(state["w"], torch.tensor(w).view(2, 2))
    torch.testing.assert_close(state["b"], torch.tensor([b]))
