"""The client's side of Algorithm 1, as functions: train what was received with SWAT, choose what to send of it."""

import os
import time
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from zerofl.data import Dataset, client_indices
from zerofl.data.partition import held_out_count, validation_split
from zerofl.exchange.update import State, Update
from zerofl.exchange.uplink import make_update
from zerofl.exchange.wire import Schema, encode
from zerofl.experiment import Experiment
from zerofl.fl.records import ClientRecord
from zerofl.fl.train import empty_model, evaluate, train
from zerofl.rng import rng
from zerofl.sparse.sparsify import realised_sparsity, sparse_layers


class Trained(NamedTuple):
    """A model after local training, the names of its sparse layers' weights, and what the training was."""

    state: State
    sparse: list[str]
    record: ClientRecord


def train_client(
    received: State, dataset: Dataset, experiment: Experiment, round: int, client: int
) -> tuple[Update, ClientRecord]:
    """Algorithm 1, "ClientUpdate": what `client` sends back in `round` of the model it received, and what it did.

    Args and errors as `train_locally`. The result is a function of the arguments alone, but for the times in the
    record: a client keeps nothing from one round to the next.

    Raises:
        ValueError: as `make_update`.
    """
    e = experiment
    trained, sparse, record = train_locally(received, dataset, e, round, client)
    return make_update(e.uplink, received, trained, sparse, e.sparsity, e.mask_ratio), record


def train_locally(received: State, dataset: Dataset, experiment: Experiment, round: int, client: int) -> Trained:
    """Algorithm 1, "TrainLocally": the received model after the client's epochs on its samples.

    The model and the samples are on `experiment.device`; the received state is not changed.

    Raises:
        ValueError: the data set has no training part.
    """
    model = empty_model(experiment, dataset)
    model.load_state_dict({name: tensor.clone() for name, tensor in received.items()}, assign=True)
    mine, _ = samples_of(experiment, client)

    clock = _cpu_clock(experiment)
    started, cpu_started = time.perf_counter(), clock() if clock else None
    train_loss = train(model, dataset.train.take(mine), dataset, experiment, round=round, client=client)
    train_seconds = time.perf_counter() - started
    train_cpu_seconds = clock() - cpu_started if clock and cpu_started is not None else None

    sizes = {name: layer.weight.numel() for name, layer in sparse_layers(model)}
    realised = realised_sparsity(model)
    record = ClientRecord(
        round=round,
        client=client,
        uplink_bytes=0,
        examples=len(mine),
        train_loss=train_loss,
        train_seconds=train_seconds,
        train_cpu_seconds=train_cpu_seconds,
        realised_sparsity=sum(realised[name] * sizes[name] for name in sizes) / sum(sizes.values()) if sizes else None,
    )
    trained = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    return Trained(trained, [f"{name}.weight" for name in sizes], record)


def clients_at_once(experiment: Experiment) -> int:
    """How many of a round's clients one process trains side by side; the results do not depend on it.

    Unless the experiment says: as many as the cores have room for with its `threads` each, or the GPU's memory.
    """
    e = experiment
    if e.clients_at_once:
        return min(e.clients_at_once, e.clients_per_round)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most = cores // e.threads if e.threads and e.device == "cpu" else 1
    return max(1, min(most, e.clients_per_round))


def _cpu_clock(experiment: Experiment) -> Callable[[], float] | None:
    """A clock of the seconds that all cores spend on this client, and on nothing else; None where none tells."""
    if clients_at_once(experiment) == 1:
        return time.process_time
    # Beside other clients only the time of the own thread is known, which is all where it works alone.
    return time.thread_time if experiment.threads == 1 and experiment.device == "cpu" else None


def encode_update(update: Update, schema: Schema, experiment: Experiment, round: int, client: int) -> bytes:
    """The update on the wire; the rounding of int8 is a function of (seed, round, client)."""
    generator = rng(experiment.seed, round, client, "int8")
    return encode(
        update,
        schema,
        values=experiment.uplink_values,
        positions=experiment.uplink_positions,
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
