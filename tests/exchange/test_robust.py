"""Clipping and the trimmed mean: by hand, against sorting, and with two of ten clients that send absurd updates."""

import math
from collections.abc import Sequence
from functools import cache

import pytest
import torch
from torch import nn

import zerofl
from zerofl.data import Dataset, Split
from zerofl.data.partition import lda_partition
from zerofl.exchange.aggregate import average
from zerofl.exchange.robust import change_norms, clipped, scaled, trimmed_mean
from zerofl.exchange.update import Sparse, State, Update, sparsified
from zerofl.exchange.uplink import UPLINKS, make_update
from zerofl.experiment import Experiment
from zerofl.fl.train import evaluate, train

LARGEST = torch.finfo(torch.float32).max


def changes(*values: list[float]) -> list[tuple[Update, int]]:
    return [(Update(True, {"w": sparsified(torch.tensor(v)), "n": torch.tensor(5)}), i) for i, v in enumerate(values)]


def of(tensor: torch.Tensor | Sparse) -> list[float]:
    return [float(x) for x in (tensor.to_dense() if isinstance(tensor, Sparse) else tensor).flatten()]


RECEIVED: State = {"w": torch.tensor([1.0, 1.0, 1.0]), "n": torch.tensor(4)}


def test_without_bounds_the_updates_pass_as_they_are() -> None:
    updates = changes([3.0, 0.0, 4.0], [1e6, 0.0, 0.0])
    passed = list(clipped(lambda _: RECEIVED, updates, 0.0, 0.0))
    assert [clip for *_, clip in passed] == [None, None]
    assert all(given is update for (given, *_), (update, _) in zip(passed, updates, strict=True))


def test_a_change_is_clipped_by_value_and_stays_sparse() -> None:
    (long, of_long, clip), (short, _, none) = clipped(
        lambda _: RECEIVED, changes([3.0, 0.0, 4.0], [0.0, 2.0, 0.0]), 2.5, 0.0
    )
    assert (of_long, clip) == (0, (5.0, 0.5))
    assert isinstance(long.tensors["w"], Sparse)
    assert long.tensors["w"].values.tolist() == [1.5, 2.0]
    assert of(long.tensors["n"]) == [4]  # 4 + (5 - 4) / 2 = 4.5, rounded to even
    assert (of(short.tensors["w"]), none) == ([0, 2, 0], (2.0, 1.0))


def test_weights_are_clipped_towards_what_was_received() -> None:
    """What was not sent is no part of the change, and stays zero."""
    sent: list[torch.Tensor | Sparse] = [
        sparsified(torch.tensor([4.0, 1.0, 5.0])),
        torch.tensor([4.0, 1.0, 5.0]),
        sparsified(torch.tensor([4.0, 0, 0])),
    ]
    updates = [(Update(False, {"w": w, "n": torch.tensor(8)}), None) for w in sent]
    assert [change_norms(RECEIVED, update)["w"] for update, _ in updates] == [5, 5, 3]
    kept = [of(update.tensors["w"]) for update, *_ in clipped(lambda _: RECEIVED, updates, 1.5, 0.0)]
    for dense in kept[:2]:
        assert dense == pytest.approx([1 + 3 * 0.3, 1, 1 + 4 * 0.3])
    assert kept[2] == [2.5, 0, 0]
    *_, last = clipped(lambda _: RECEIVED, updates, 1.5, 0.0)
    assert isinstance(last[0].tensors["w"], Sparse)
    assert of(last[0].tensors["n"]) == [6]
    assert last[2] == (3, 0.5)


@pytest.mark.parametrize(
    ("lengths", "multiple", "kept"),
    [
        ([1.0, 3.0, 50.0], 1.0, [1, 3, 3]),
        ([1.0, 3.0, 50.0], 2.0, [1, 3, 6]),
        ([2.0, 1.0, 50.0, 1e9], 1.0, [2, 1, 2, 2]),  # the lower of the middle two: half of them may be absurd
        ([1e9], 1.0, [1e9]),
        ([0.0, 0.0, 7.0], 1.0, [0, 0, 0]),  # most left it as it was
    ],
)
def test_each_tensor_is_clipped_to_a_multiple_of_the_rounds_median(
    lengths: list[float], multiple: float, kept: list[float]
) -> None:
    """The second tensor has the norms in the reverse order."""
    received: State = {"a": torch.zeros(3), "b": torch.zeros(2)}
    updates = [
        (Update(True, {"a": sparsified(torch.tensor([0.0, -x, 0.0])), "b": torch.tensor([y, 0.0])}), None)
        for x, y in zip(lengths, lengths[::-1], strict=True)
    ]
    given = list(clipped(lambda _: received, updates, 0.0, multiple))
    assert [-of(update.tensors["a"])[1] for update, *_ in given] == kept
    assert [of(update.tensors["b"])[0] for update, *_ in given] == kept_backwards(lengths, multiple)
    before = [math.hypot(x, y) for x, y in zip(lengths, lengths[::-1], strict=True)]
    after = [math.hypot(*of(u.tensors["a"]), *of(u.tensors["b"])) for u, *_ in given]
    assert [clip.norm for *_, clip in given if clip] == pytest.approx(before)
    assert [clip.factor for *_, clip in given if clip] == pytest.approx(
        [a / b if b else 1 for a, b in zip(after, before, strict=True)]
    )


def kept_backwards(lengths: list[float], multiple: float) -> list[float]:
    bound = multiple * sorted(lengths)[(len(lengths) - 1) // 2]
    return [min(length, bound) for length in lengths[::-1]]


def test_both_bounds_hold_the_median_first() -> None:
    """Norms 5, 5 and 50 in w: the median leaves 5 of the last one, the value 2 of each."""
    updates = changes([3.0, 0.0, 4.0], [0.0, 5.0, 0.0], [0.0, 50.0, 0.0])
    given = list(clipped(lambda _: RECEIVED, updates, 2.0, 1.0))
    assert [pytest.approx(of(update.tensors["w"])) for update, *_ in given] == [[1.2, 0, 1.6], [0, 2, 0], [0, 2, 0]]
    assert [clip for *_, clip in given] == [pytest.approx(c) for c in ((5, 0.4), (5, 0.4), (50, 0.04))]


def test_the_largest_floats_are_clipped_without_overflow() -> None:
    received: State = {"w": torch.full((4,), -LARGEST)}
    updates = [(Update(False, {"w": torch.full((4,), LARGEST)}), None)]
    ((update, _, clip),) = clipped(lambda _: received, updates, 2.0, 0.0)
    assert clip == pytest.approx((4 * LARGEST, 0.5 / LARGEST))
    assert of(update.tensors["w"]) == [-LARGEST] * 4  # a step of 1 is nothing there
    ((update, *_),) = clipped(lambda _: {"w": torch.zeros(4)}, updates, 2.0, 0.0)
    assert of(update.tensors["w"]) == [1, 1, 1, 1]


def whole(*values: list[float]) -> list[tuple[Update, int]]:
    return [(Update(False, {"w": torch.tensor(v), "n": torch.tensor(int(v[0]))}), i + 1) for i, v in enumerate(values)]


def test_the_trimmed_mean_leaves_out_the_extremes_of_each_entry() -> None:
    received: State = {"w": torch.tensor([9.0, 9.0]), "n": torch.tensor(9)}
    updates = whole([1.0, LARGEST], [2.0, 4.0], [4.0, 5.0], [1e6, -LARGEST])
    averaged = trimmed_mean(received, updates, 1)
    assert averaged["w"].tolist() == [3, 4.5]
    assert (averaged["n"].dtype, averaged["n"].item()) == (torch.int64, 3)
    for few in (updates[:2], []):
        assert trimmed_mean(received, few, 1)["w"].tolist() == [9, 9]


@pytest.mark.parametrize("trim", [0, 1, 2, 3])
@pytest.mark.parametrize("clients", [7, 8, 12])
def test_the_trimmed_mean_is_that_of_the_sorted_values(clients: int, trim: int) -> None:
    """With ties, and a model that came sparse."""
    values = torch.randint(-4, 5, (clients, 50), generator=torch.Generator().manual_seed(clients)).float()
    updates = [(Update(False, {"w": sparsified(v) if i % 2 else v}), 10**i) for i, v in enumerate(values)]
    expected = values.sort(0).values[trim : clients - trim].mean(0)
    torch.testing.assert_close(trimmed_mean({"w": torch.zeros(50)}, updates, trim)["w"], expected)


def test_changes_are_not_trimmed() -> None:
    with pytest.raises(ValueError, match="an update holds changes: expected whole models"):
        trimmed_mean(RECEIVED, changes([1.0, 2.0, 3.0]), 1)


# Ten clients learn ten noisy patterns; BatchNorm's statistics are part of what is sent, and of what is absurd.
ABSURD = (2, 7)
LABELS = torch.arange(1200) % 10


def federated(uplink: str, seed: int, absurd: Sequence[int] = (), **guard: float) -> float:
    """The accuracy after three rounds in which the absurd clients send 1e6 times their change."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(10, 1, 8, 8, generator=generator)[LABELS] + 1.5 * torch.randn(
        1200, 1, 8, 8, generator=generator
    )
    split = Split(images[:800], LABELS[:800]), Split(images[800:], LABELS[800:])
    data = Dataset(*split, classes=tuple("0123456789"), mean=(0.0,), std=(1.6,), clients={})
    e = Experiment(
        clients=10, rounds=3, epochs=2, batch_size=16, sparsity=0.5, mask_ratio=0.2, uplink=uplink, seed=seed, threads=1
    )  # fmt: skip
    parts = lda_partition(data.train.labels, e.clients, e.alpha, e.seed)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(256, 10),
    )  # fmt: skip
    sparse = [f"{name}.weight" for name in zerofl.sparsify_(model, e.sparsity, layers=["3"], backend="reference")]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for round in range(1, e.rounds + 1):
        updates = []
        for client in range(e.clients):
            model.load_state_dict(state)
            train(model, data.train.take(parts[client]), data, e, round=round, client=client)
            trained = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            update = make_update(e.uplink, state, trained, sparse, e.sparsity, e.mask_ratio)
            if client in absurd:
                update = scaled(state, update, dict.fromkeys(update.tensors, 1e6))
            updates.append((update, len(parts[client])))
        bounds = guard.get("norm", 0.0), guard.get("median", 0.0)
        received = state
        given = ((u, n) for u, n, _ in clipped(lambda _: received, updates, *bounds))  # noqa: B023, which is used up here
        state = trimmed_mean(state, given, int(guard["trim"])) if "trim" in guard else average(state, given)
    model.load_state_dict(state)
    return evaluate(model, data.test, data)[1]


@cache
def undisturbed() -> list[float]:
    return [federated("full", seed) for seed in (1, 2, 3)]


@pytest.mark.parametrize(
    ("uplink", "guard"),
    [*((uplink, {"median": 1.0}) for uplink in UPLINKS), ("top_k_weights_diff", {"norm": 1.0}), ("full", {"trim": 2})],
)
def test_two_of_ten_absurd_clients_leave_the_model_within_the_noise_of_seeds(
    uplink: str, guard: dict[str, float]
) -> None:
    accuracy = federated(uplink, 1, ABSURD, **guard)
    assert accuracy > min(undisturbed()) - 0.02, undisturbed()
    assert min(undisturbed()) > 0.6


def test_without_a_guard_they_destroy_it() -> None:
    assert federated("full", 1, ABSURD) < 0.2
