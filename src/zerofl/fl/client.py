"""The client's side of Algorithm 1, as functions: train what was received with SWAT, choose what to send of it."""

import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple, Protocol

from torch import Tensor

from zerofl.data import Dataset, Split, client_indices, load_dataset
from zerofl.data.partition import held_out_count, validation_split
from zerofl.exchange.update import State, Update
from zerofl.exchange.uplink import make_update
from zerofl.exchange.wire import Received, Schema, encode
from zerofl.experiment import Experiment
from zerofl.fl import compiled, energy
from zerofl.fl.precision import arithmetic
from zerofl.fl.records import ClientRecord
from zerofl.fl.train import TrainedModel, empty_model, evaluate, train_state
from zerofl.rng import rng


class Trained(NamedTuple):
    """A model after local training, the names of its sparse layers' weights, and what the training was."""

    state: State
    sparse: list[str]
    record: ClientRecord


def train_client(
    received: State, dataset: Dataset, experiment: Experiment, round: int, client: int, *, side_by_side: bool = False
) -> tuple[Update, ClientRecord]:
    """Algorithm 1, "ClientUpdate": what `client` sends back in `round` of the model it received, and what it did.

    `dataset` is the experiment's, whose partition deals it, and with the received state on `experiment.device`. The
    result is a function of the arguments alone, but for the times and the energy in the record: a client keeps nothing
    from one round to the next. With `side_by_side` this process trains others at the same time, beside which the
    seconds of several threads are not known.

    Raises:
        ValueError: the data set has no training part, or is not the experiment's; or as `make_update`.
    """
    e = experiment
    trained, sparse, record = train_locally(received, dataset, e, round, client, side_by_side=side_by_side)
    choice = sparse, e.sparsity, e.mask_ratio, e.sparsity_distribution
    return make_update(e.uplink, received, trained, *choice), record


def train_locally(
    received: State, dataset: Dataset, experiment: Experiment, round: int, client: int, *, side_by_side: bool = False
) -> Trained:
    """Algorithm 1, "TrainLocally": the received model after the client's epochs on its samples.

    The model and the samples are on `experiment.device`; the received state is not changed.

    Raises:
        ValueError: the data set has no training part, or is not the experiment's.
    """
    e = experiment
    mine, _ = samples_of(e, client)
    dealt = len(load_dataset(e.dataset, e.root).train.labels)
    if len(dataset.train.labels) != dealt:
        raise ValueError(
            f"the data set given has {len(dataset.train.labels)} training samples, and {e.dataset}, which the "
            f"experiment's partition deals, {dealt}; give that one, or for data of your own write the loop as "
            "docs/method.md does"
        )
    samples = dataset.train.take(mine)
    with arithmetic(e.precision, e.device), _training(e, dataset) as train:
        clock = _cpu_clock(e, side_by_side)
        counted = energy.read()
        started, cpu_started = time.perf_counter(), clock() if clock else None
        trained = train(received, samples, round=round, client=client)
        train_seconds = time.perf_counter() - started
        train_cpu_seconds = clock() - cpu_started if clock and cpu_started is not None else None
        train_joules, train_joules_estimate = joules_of(e, counted, train_cpu_seconds)

    sizes = {name: trained.state[f"{name}.weight"].numel() for name in trained.sparse}
    realised = trained.realised_sparsity
    record = ClientRecord(
        round=round,
        client=client,
        uplink_bytes=0,
        examples=len(mine),
        train_loss=trained.loss,
        train_seconds=train_seconds,
        train_cpu_seconds=train_cpu_seconds,
        train_joules=train_joules,
        train_joules_estimate=train_joules_estimate,
        realised_sparsity=sum(realised[name] * sizes[name] for name in sizes) / sum(sizes.values()) if sizes else None,
    )
    return Trained(trained.state, [f"{name}.weight" for name in sizes], record)


class _Train(Protocol):
    """`train_state` of an experiment and data set."""

    def __call__(self, received: State, split: Split, *, round: int, client: int) -> TrainedModel: ...


@contextmanager
def _training(experiment: Experiment, dataset: Dataset) -> Iterator[_Train]:
    """What trains a client of this experiment: on a GPU a slot where its steps are recorded, else plain PyTorch."""
    if compiled.takes(experiment):
        with compiled.slot(experiment, dataset, clients_at_once(experiment)) as slot:
            yield slot.train
        return
    if experiment.device != "cpu":
        warnings.warn(
            f"topk_period = {experiment.topk_period}: steps that differ are not recorded as a CUDA graph, so the GPU "
            "waits for Python; with topk_period = 1 it does not",
            stacklevel=2,
        )
    yield partial(train_state, dataset=dataset, experiment=experiment)


def clients_at_once(experiment: Experiment) -> int:
    """How many of a round's clients one process trains side by side; the results do not depend on it.

    Unless the experiment says: as many as the cores have room for with its `threads` each. On a GPU all of a round, or
    as many of them as its memory has room for (`compiled.slot`), and one where steps are not recorded.
    """
    e = experiment
    if e.clients_at_once:
        return min(e.clients_at_once, e.clients_per_round)
    if e.device != "cpu":
        return e.clients_per_round if compiled.takes(e) else 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most = cores // e.threads if e.threads else 1
    return max(1, min(most, e.clients_per_round))


def _cpu_clock(experiment: Experiment, side_by_side: bool) -> Callable[[], float] | None:
    """A clock of the seconds that all cores spend on this client, and on nothing else; None where none tells."""
    if experiment.threads == 1 and experiment.device == "cpu":
        return time.thread_time  # without other clients, and without the round before, which is written meanwhile
    return None if side_by_side else time.process_time


def joules_of(
    experiment: Experiment, before: energy.Reading | None, cpu_seconds: float | None
) -> tuple[float | None, float | None]:
    """What training took since the counters were read: joules as measured and as estimated, None where unknown."""
    if experiment.device != "cpu":
        return None, None
    measured = energy.joules(before, energy.read(), cpu_seconds)
    return measured, energy.joules_estimate(cpu_seconds, experiment.watts_per_core)


def encode_update(
    update: Update, schema: Schema, received: Received, experiment: Experiment, round: int, client: int
) -> bytes:
    """The update of the received model on the wire; the rounding of int8 is a function of (seed, round, client)."""
    generator = rng(experiment.seed, round, client, "int8")
    return encode(
        update,
        schema,
        values=experiment.uplink_values,
        positions=experiment.uplink_positions,
        received=received,
        generator=generator,
    )


class Validation(NamedTuple):
    """The accuracy, in [0, 1], of a model on the samples that a client holds out; None if it is not to be believed."""

    client: int
    examples: int
    accuracy: float | None


def validate_client(received: State, dataset: Dataset, experiment: Experiment, client: int) -> tuple[Validation, float]:
    """How the received model does on the samples that `client` holds out: its accuracy, and its loss.

    Raises:
        ValueError: the client holds out none.
    """
    _, held_out = samples_of(experiment, client)
    if not len(held_out):
        raise ValueError("it has no validation samples; raise validation_fraction, or set validate_every = 0")
    model = empty_model(experiment, dataset)
    model.load_state_dict(received, assign=True)
    with arithmetic(experiment.precision, experiment.device):
        loss, accuracy = evaluate(model, dataset.train.take(held_out), dataset)
    return Validation(client, len(held_out), accuracy), loss


def samples_of(experiment: Experiment, client: int) -> tuple[Tensor, Tensor]:
    """The indices into the training part that a client trains on, and those it holds out for validation.

    Raises:
        ValueError: the data set has no training part.
    """
    e = experiment
    mine = client_indices(e.dataset, e.root, e.partition, e.clients, e.alpha, e.seed)[client]
    if not len(mine):
        raise ValueError(f"{e.dataset}: {e.root} has no training part; add one")
    return validation_split(mine, e.validation_fraction, e.seed, client)


MOST_EXAMPLES = 2**31 - 1
"""What a node with data of its own may say it has: nobody can check it."""


def clients_of(experiment: Experiment) -> tuple[int, set[int]]:
    """How many samples any client can have, and the clients that hold some out for validation.

    A client may be too small to hold anything out: it has no part in the validation. With data of their own only the
    nodes know.
    """
    e = experiment
    if e.partition == "node":
        return MOST_EXAMPLES, set(range(e.clients))
    samples = [len(part) for part in client_indices(e.dataset, e.root, e.partition, e.clients, e.alpha, e.seed)]
    return max(samples), {k for k, count in enumerate(samples) if held_out_count(count, e.validation_fraction)}
