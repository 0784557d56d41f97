"""The server's side of Algorithm 1, as functions: the first model, and the step from a round's updates to the next."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import nn

from zerofl.data import Dataset
from zerofl.errors import ZeroFLError
from zerofl.exchange.aggregate import ServerOptimizer, average, fedadam, fedavg, fedavgm, nonzero_ratio
from zerofl.exchange.overlap import MaskCounts
from zerofl.exchange.robust import clipped, trimmed_mean
from zerofl.exchange.round_mean import round_mean, with_round_mean
from zerofl.exchange.rounded import put_back, rounding
from zerofl.exchange.update import State, Update
from zerofl.experiment import Experiment
from zerofl.fl.precision import arithmetic
from zerofl.fl.records import ClientRecord, FailureRecord, RoundRecord, total
from zerofl.fl.train import empty_model, evaluate, initial_model, learning_rate
from zerofl.sparse.sparsify import sparse_layers


class RoundError(ZeroFLError):
    """A round that cannot be completed; what was computed before it is in the run's folder."""


class ServerState(NamedTuple):
    """What the server carries from one round to the next: the model, and the optimiser's own tensors."""

    model: State
    optimizer: State

    def evaluated(self) -> State:
        """The model to evaluate and to keep: the mean over the rounds with `average_decay`, else the newest one."""
        return round_mean(self.optimizer) or self.model


class Failure(NamedTuple):
    """A client that sent no usable update, and why; `refused_bytes` are those of a payload that was none."""

    client: int
    cause: str
    refused_bytes: int = 0


Answer = tuple[Update, ClientRecord] | Failure
"""What comes of asking a client to train."""


def initial_state(experiment: Experiment, dataset: Dataset) -> ServerState:
    """What the server starts from, a function of the seed."""
    model = initial_model(experiment, dataset)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    return ServerState(state, optimizer_of(experiment, model).init(state))


def step(
    state: ServerState,
    answers: Iterable[Answer],
    experiment: Experiment,
    dataset: Dataset,
    round: int,
    sent: State | None = None,
) -> tuple[ServerState, RoundRecord, list[ClientRecord]]:
    """Algorithm 1, "ServerExecutes", from the clients' answers on: the next state, and the round's records.

    Sums are in the order of the answers, which should be that of the clients. An answer is let go before the next one
    is asked for, so that one update at a time is in memory if `answers` makes them so; only for `clip_median` are all
    kept. The record has neither the bytes down nor the round's time, which are those of who carries the messages.
    `sent` is the model that the clients received, if it is the state's rounded to `downlink_values`: what they changed
    of it is put onto the state's.

    Raises:
        RoundError: fewer than `experiment.min_replies` updates.
    """
    e, failures, records, masks = experiment, list[Failure](), list[ClientRecord](), MaskCounts()
    received = state.model if sent is None else sent
    taken_off = rounding(state.model, received)

    def usable() -> Iterator[tuple[Update, ClientRecord]]:
        for answer in answers:
            if isinstance(answer, Failure):
                failures.append(answer)
                continue
            masks.add(answer[0])
            yield answer
            del answer

    def updates() -> Iterator[tuple[Update, int]]:
        for update, record, clip in clipped(lambda _: received, usable(), e.clip_norm, e.clip_median):
            records.append(replace(record, update_norm=clip.norm, clip_factor=clip.factor) if clip else record)
            onto_own = put_back(update, taken_off)
            del update
            yield onto_own, record.examples
            del onto_own

    if e.trim_clients:
        averaged = trimmed_mean(state.model, updates(), e.trim_clients, e.device)
    else:
        averaged = average(state.model, updates(), e.device)
    if len(records) < experiment.min_replies:
        raise RoundError(_too_few(round, len(records), experiment, failures))
    model = empty_model(experiment, dataset)
    new_model, optimizer_state = optimizer_of(experiment, model).step(state.model, averaged, state.optimizer)
    record = RoundRecord(
        round=round,
        lr=learning_rate(experiment.lr_start, experiment.lr_end, round, experiment.rounds),
        clients=sorted([record.client for record in records] + [failure.client for failure in failures]),
        failures=failure_records(failures),
        examples=sum(record.examples for record in records),
        train_loss=weighted_mean([(record.train_loss, record.examples) for record in records]),
        train_seconds=sum(record.train_seconds or 0.0 for record in records),
        train_cpu_seconds=total([record.train_cpu_seconds for record in records]),
        train_joules=total([record.train_joules for record in records]),
        train_joules_estimate=total([record.train_joules_estimate for record in records]),
        realised_sparsity=weighted_mean([(record.realised_sparsity, record.examples) for record in records]),
        uplink_bytes=sum(record.uplink_bytes for record in records),
        refused_bytes=sum(failure.refused_bytes for failure in failures),
        downlink_bytes=0,
        nonzero_ratio={name: nonzero_ratio(new_model[f"{name}.weight"]) for name, _ in sparse_layers(model)},
        mask_overlap={name.removesuffix(".weight"): overlap for name, overlap in masks.overlap().items()},
        seconds=0.0,
    )
    return ServerState(new_model, optimizer_state), record, records


def optimizer_of(experiment: Experiment, model: nn.Module) -> ServerOptimizer:
    """The experiment's server optimiser, for the parameters of `model`; with `average_decay` it keeps the mean too."""
    e, parameters = experiment, [name for name, _ in model.named_parameters()]
    assert e.server_lr is not None  # the experiment settles it
    if e.server_optimizer == "fedavg":
        optimizer = fedavg()
    elif e.server_optimizer == "fedavgm":
        optimizer = fedavgm(parameters, e.server_lr, e.server_beta_1)
    elif e.server_optimizer in ("fedadam", "fedadam_sparse"):
        zeros = e.server_optimizer == "fedadam_sparse"
        optimizer = fedadam(parameters, e.server_lr, e.server_beta_1, e.server_beta_2, e.server_tau, keep_zeros=zeros)
    else:
        raise ValueError(f"server_optimizer = {e.server_optimizer!r}: nothing here makes it")
    return with_round_mean(optimizer, e.average_decay) if e.average_decay else optimizer


def test_model(state: State, dataset: Dataset, experiment: Experiment) -> tuple[float | None, float]:
    """The loss and the accuracy, in [0, 1], of a model on the test part, with its top-k weights (§4.3).

    The loss of a diverged model, which is not finite, is None: JSON has no number for it.
    """
    device = dataset.test.images.device
    model = empty_model(experiment, dataset)
    model.load_state_dict({name: tensor.to(device) for name, tensor in state.items()}, assign=True)
    with arithmetic(experiment.precision, experiment.device):
        loss, accuracy = evaluate(model, dataset.test, dataset)
    return loss if math.isfinite(loss) else None, accuracy


def weighted_mean(figures: Sequence[tuple[float | None, int]]) -> float | None:
    """The mean of a figure, weighted by samples, over the clients that report it; None if none does."""
    values = [(value, examples) for value, examples in figures if value is not None]
    examples = sum(examples for _, examples in values)
    return float(sum(value * examples for value, examples in values) / examples) if values else None


def failure_records(failures: Iterable[Failure]) -> list[FailureRecord]:
    """The failures in client order, as a record has them."""
    return [FailureRecord(client=of.client, cause=printable(of.cause)) for of in sorted(failures)]


def printable(cause: str) -> str:
    """A client's words, at most 300 characters of them, without what a terminal would obey."""
    text = "".join(character if character.isprintable() else " " for character in cause[:1000])
    return text if len(text) <= 300 else text[:299] + "…"


def _too_few(round: int, good: int, experiment: Experiment, failures: list[Failure]) -> str:
    clients_of: dict[str, list[str]] = {}
    for failure in sorted(failures):
        clients_of.setdefault(printable(failure.cause), []).append(str(failure.client))
    causes = "; ".join(f"client {', '.join(clients)}: {cause}" for cause, clients in clients_of.items())
    return (
        f"round {round}: {good} of {experiment.clients_per_round} clients sent a usable update, min_replies = "
        f"{experiment.min_replies} are needed. {causes}"
    )
