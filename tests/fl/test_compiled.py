"""Training in slots against the plain loop. A CPU runs the same code without recording; the rest needs a GPU."""

import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.running import experiment_of, model_bytes, run
from zerofl.data import Dataset, Split, dataset_on, load_dataset
from zerofl.exchange.update import State
from zerofl.exchange.uplink import UPLINKS, make_update
from zerofl.experiment import Experiment
from zerofl.fl import compiled
from zerofl.fl.client import samples_of
from zerofl.fl.precision import arithmetic
from zerofl.fl.records import ClientRecord
from zerofl.fl.server import initial_state, step
from zerofl.fl.train import TrainedModel, train_state

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def tiny(cifar_root: Path) -> tuple[Experiment, Dataset, State]:
    """Of 36 samples a client: a batch of 20, and a rest of 16.

    Two steps, because the rounding of the first two flips one of the top-K choices in a later one.
    """
    experiment = experiment_of(cifar_root, augment=True, batch_size=20, width=16, lr_start=0.01, lr_end=0.01)
    dataset = load_dataset("cifar10", str(cifar_root))
    return experiment, dataset, initial_state(experiment, dataset).model


def split_of(experiment: Experiment, dataset: Dataset, client: int) -> Split:
    return dataset.train.take(samples_of(experiment, client)[0])


def assert_close(one: State, other: State, atol: float) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=atol, msg=lambda text: f"{name}: {text}")  # noqa: B023


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"momentum": 0.9, "weight_decay": 1e-3},
        {"powerpropagation": 1.25},
        {"powerpropagation": 1.5, "momentum": 0.9, "weight_decay": 1e-3},
        {"sparsity": 0.0},
        {"activation_sparsity": 0.5, "augment": False},
        {"epochs": 2, "batch_size": 40},
        {"model": "leaf_cnn", "dataset": "mnist5k", "root": "", "augment": False, "batch_size": 200, "lr_start": 0.1},
    ],
)
def test_a_slot_trains_as_the_plain_loop_does(values: dict[str, Any], tiny: tuple[Experiment, Dataset, State]) -> None:
    experiment = dataclasses.replace(tiny[0], **values)
    dataset = load_dataset(experiment.dataset, experiment.root)
    received = initial_state(experiment, dataset).model
    slot = compiled.Slot(experiment, dataset)
    before = {name: tensor.clone() for name, tensor in received.items()}
    for client in (0, 1):  # one after another in the same memory
        split = split_of(experiment, dataset, client)
        plain = train_state(received, split, dataset, experiment, round=1, client=client)
        fast = slot.train(received, split, round=1, client=client)
        assert_close(plain.state, fast.state, atol=2e-4)  # of steps up to 0.05, by rounding; 6e-5 was seen
        assert fast.loss == pytest.approx(plain.loss, abs=1e-5)
        assert fast.sparse == plain.sparse
        assert fast.realised_sparsity == pytest.approx(plain.realised_sparsity)
        assert max(float((fast.state[name] - received[name]).abs().max()) for name in received) > 1e-3
    assert_close(received, before, atol=0)


@pytest.mark.parametrize("uplink", UPLINKS)
def test_a_round_in_slots_is_a_round_of_the_plain_loop(uplink: str) -> None:
    experiment = experiment_of(
        Path(), dataset="mnist5k", model="leaf_cnn", clients=100, uplink=uplink, mask_ratio=0.2, batch_size=16
    )
    dataset = load_dataset("mnist5k", "")
    state = initial_state(experiment, dataset)
    slot = compiled.Slot(experiment, dataset)

    def answers(fast: bool) -> Iterator[Any]:
        for client in range(3):
            split = split_of(experiment, dataset, client)
            trained = (
                slot.train(state.model, split, round=1, client=client)
                if fast
                else train_state(state.model, split, dataset, experiment, round=1, client=client)
            )
            sparse = [f"{name}.weight" for name in trained.sparse]
            update = make_update(uplink, state.model, trained.state, sparse, 0.9, 0.2)
            examples = len(split.labels)
            yield (
                update,
                ClientRecord(round=1, client=client, uplink_bytes=1, examples=examples, train_loss=trained.loss),
            )

    (plain, _, _), (fast, _, _) = (step(state, answers(fast), experiment, dataset, 1) for fast in (False, True))
    assert_close(plain.model, fast.model, atol=1e-5)


def test_a_client_that_fails_leaves_its_slot_to_the_next(tiny: tuple[Experiment, Dataset, State]) -> None:
    experiment, dataset, received = tiny
    split = split_of(experiment, dataset, 0)
    expected = compiled.Slot(experiment, dataset).train(received, split, round=1, client=0)
    slot = compiled.Slot(experiment, dataset)
    nan = {
        name: torch.full_like(tensor, torch.nan if tensor.is_floating_point() else 0)
        for name, tensor in received.items()
    }
    assert torch.isnan(slot.train(nan, split, round=1, client=0).state["fc.weight"]).all()
    with pytest.raises(IndexError):  # in the middle: a label that is no class
        slot.train(received, Split(split.images, torch.full_like(split.labels, 99)), round=1, client=0)
    after = slot.train(received, split, round=1, client=0)
    assert after.loss == expected.loss
    assert_close(after.state, expected.state, atol=0)


def test_slots_are_shared_and_no_more_than_are_asked_for(tiny: tuple[Experiment, Dataset, State]) -> None:
    """Eight clients in two slots, four threads at a time: each is as if it were alone."""
    experiment, dataset, received = tiny
    alone = [train(experiment, dataset, received, client) for client in range(4)]
    slots, together = set(), dict[int, TrainedModel]()
    two = threading.Barrier(2)

    def client(number: int) -> None:
        with compiled.slot(experiment, dataset, most=2) as slot:
            two.wait(timeout=60)
            slots.add(slot)
            split = split_of(experiment, dataset, number)
            together[number] = slot.train(received, split, round=1, client=number)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(slots) == 2
    for number, expected in enumerate(alone):
        assert_close(together[number].state, expected.state, atol=0)


def train(experiment: Experiment, dataset: Dataset, received: State, client: int) -> TrainedModel:
    slot = compiled.Slot(experiment, dataset)
    return slot.train(received, split_of(experiment, dataset, client), round=1, client=client)


@needs_gpu
@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_a_gpu_ends_in_the_same_bits_however_many_are_at_once(precision: str, cifar_root: Path, tmp_path: Path) -> None:
    for at_once in (1, 3, 0):
        experiment = experiment_of(
            cifar_root, device="cuda", precision=precision, clients_at_once=at_once, momentum=0.9, augment=True
        )
        run(experiment, tmp_path / str(at_once))
    assert model_bytes(tmp_path / "1") == model_bytes(tmp_path / "3") == model_bytes(tmp_path / "0")


@pytest.mark.parametrize("fitting", [0, 1])
def test_memory_that_has_no_room_for_another_slot(
    fitting: int, tiny: tuple[Experiment, Dataset, State], monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment, dataset, _ = tiny
    experiment = dataclasses.replace(experiment, name=f"fitting-{fitting}")  # slots of its own
    made: list[object] = []

    def make(*arguments: object) -> object:
        if len(made) == fitting:
            raise torch.OutOfMemoryError("no room")
        made.append(object())
        return made[-1]

    monkeypatch.setattr(compiled, "Slot", make)
    if not fitting:
        with pytest.raises(torch.OutOfMemoryError), compiled.slot(experiment, dataset, most=2):
            pass
        return
    waited: list[object] = []

    def second() -> None:
        with compiled.slot(experiment, dataset, most=2) as slot:
            waited.append(slot)

    with compiled.slot(experiment, dataset, most=2):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(timeout=0.2)
        assert not waited
    thread.join()
    assert waited == made


@needs_gpu
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"powerpropagation": 1.5, "momentum": 0.9, "weight_decay": 1e-3},
        {"sparsity_distribution": "erdos_renyi_kernel"},
    ],
)
def test_a_recorded_step_is_the_plain_one(
    values: dict[str, Any], tiny: tuple[Experiment, Dataset, State], recwarn: pytest.WarningsRecorder
) -> None:
    experiment = dataclasses.replace(tiny[0], device="cuda", **values)
    dataset = dataset_on(experiment.dataset, experiment.root, "cuda")
    received = {name: tensor.cuda() for name, tensor in tiny[2].items()}
    split = Split(*(t.cuda() for t in vars(split_of(experiment, tiny[1], 0)).values()))
    with arithmetic("float32", "cuda"):
        plain = train_state(received, split, dataset, experiment, round=1, client=0).state
        fast = compiled.Slot(experiment, dataset).train(received, split, round=1, client=0).state
    names = [name for name in received if name.endswith("weight")]
    change, difference = (
        torch.cat([(one[name] - other[name]).flatten() for name in names]).norm()
        for one, other in ((plain, received), (plain, fast))
    )
    assert change > 0
    assert difference < 0.05 * change  # a top-K choice may flip by another rounding
    assert not [warning for warning in recwarn if "cannot be recorded" in str(warning.message)]
