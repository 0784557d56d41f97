"""The server: the rounds of Algorithm 1 over a Flower grid, recorded and resumable.

It does not use Flower's stock strategies: those draw cohorts from the global random state, sum replies in order of
arrival, turn integer counters into floats, let FedAdam optimise BatchNorm's statistics, and cannot resume.
"""

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, Message, MessageType
from flwr.serverapp import Grid, ServerApp

from zerofl.data import Dataset, client_indices, dataset_checksum, dataset_on, load_dataset
from zerofl.data.partition import held_out_count
from zerofl.exchange.aggregate import Average, ServerOptimizer, fedadam, fedavg, nonzero_ratio
from zerofl.exchange.overlap import MaskCounts
from zerofl.exchange.uplink import UPLINKS, State
from zerofl.exchange.wire import Schema, decode, encode_state, schema_of
from zerofl.experiment import Experiment
from zerofl.fl.flops import training_flops
from zerofl.fl.train import empty_model, evaluate, initial_model, learning_rate
from zerofl.flower.messages import instructions, read_metrics, read_payload
from zerofl.rng import cohort
from zerofl.run.folder import CHECKPOINT, Checkpoint, ResultsError, finish_run, save_round, save_snapshot
from zerofl.run.origin import code
from zerofl.sparse.layers import sparse_layers

Record = dict[str, Any]
Replies = list[tuple[int, Message]]
OnRound = Callable[[Record], None]

MOST_EXAMPLES = 2**31 - 1
"""What a node with data of its own may say it has: nobody can check it."""

FIRST_WORD_SECONDS, NEXT_WORD_SECONDS = 5, 30
"""After how long the server says that nodes are missing, and how often again."""

_log = logging.getLogger("flwr")  # Flower's own, which `flwr run --stream` and `flwr log` show


class RoundError(Exception):
    """A round that cannot be completed; what was computed before it is in the run's folder."""


def server_app(experiment: Experiment, directory: Path, checkpoint: Checkpoint | None, on_round: OnRound) -> ServerApp:
    """The ServerApp that runs `experiment` into `directory`, on from `checkpoint`, and reports each round's record."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        serve(grid, experiment, directory, checkpoint, on_round)

    return app


def serve(
    grid: Grid, experiment: Experiment, directory: Path, checkpoint: Checkpoint | None, on_round: OnRound
) -> None:
    """Run the rounds after the checkpoint's, or all of them, and finish the run's folder.

    Raises:
        RoundError: too few nodes for the experiment, or too few usable updates in a round.
        DatasetError: the data set is not there.
        ResultsError: it is not the data that the rounds before the checkpoint were trained on, or not their model.
    """
    torch.set_num_threads(experiment.threads)
    dataset = load_dataset(experiment.dataset, experiment.root)
    data_sha256 = dataset_checksum(experiment.dataset, experiment.root)
    model = empty_model(experiment, dataset)
    schema = schema_of(model.state_dict())
    optimizer = _server_optimizer(experiment, [name for name, _ in model.named_parameters()])
    if checkpoint is None:
        initial = initial_model(experiment, dataset).state_dict()
        state = {name: tensor.detach() for name, tensor in initial.items()}
        optimizer_state, done = optimizer.init(state), 0
    else:
        if checkpoint.data_sha256 != data_sha256:
            raise ResultsError(
                f"{directory}: its rounds 1 to {checkpoint.round} were trained on other data than is in "
                f"{experiment.root or experiment.dataset} (SHA-256 {checkpoint.data_sha256[:16]}… and "
                f"{data_sha256[:16]}…). Give the same data, or start elsewhere with --out"
            )
        state, optimizer_state, done = _state_of(checkpoint, schema, optimizer, directory)
    now = code()["sources_sha256"]
    earlier = tuple(sources for sources in checkpoint.sources_sha256 if sources != now) if checkpoint else ()
    nodes = _wait_for_nodes(grid, experiment)
    adds = UPLINKS[experiment.uplink].adds
    most_examples, validated = _clients(experiment)
    sparse = [name for name, _ in sparse_layers(model)]

    payload = encode_state(state, schema)
    for round in range(done + 1, experiment.rounds + 1):
        started = time.perf_counter()
        clients = cohort(experiment.seed, round, experiment.clients, experiment.clients_per_round)
        nodes = nodes_by_client(nodes, grid.get_node_ids(), experiment.clients)
        replies, failures = _exchange(grid, MessageType.TRAIN, payload, nodes, clients, round, experiment)
        average, masks, client_records, refused_bytes = _sum_updates(
            replies, failures, state, schema, adds, most_examples, round
        )
        if len(client_records) < experiment.min_replies:
            raise RoundError(_too_few(round, len(client_records), experiment, failures))
        state, optimizer_state = optimizer.step(state, average.of(adds), optimizer_state)
        downlink_bytes = len(clients) * len(payload)
        try:
            payload = encode_state(state, schema)
        except ValueError as error:
            raise RoundError(f"round {round}: the new model cannot be sent: {error}") from error
        record: Record = {
            "round": round,
            "lr": learning_rate(experiment.lr_start, experiment.lr_end, round, experiment.rounds),
            "clients": clients,
            "failures": _failure_records(failures),
            "examples": sum(client["num-examples"] for client in client_records),
            "train_loss": _mean(client_records, "train_loss"),
            "train_seconds": sum(client["train_seconds"] or 0.0 for client in client_records),
            "train_cpu_seconds": sum(client["train_cpu_seconds"] or 0.0 for client in client_records),
            "realised_sparsity": _mean(client_records, "realised_sparsity"),
        }
        last = round == experiment.rounds
        if last or round % experiment.evaluate_every == 0:
            record |= _test(model, state, dataset_on(experiment.dataset, experiment.root, experiment.device))
        if experiment.validate_every and (last or round % experiment.validate_every == 0):
            validating = [client for client in clients if client in validated]
            accuracy, failures = _validate(grid, payload, nodes, validating, round, experiment, most_examples)
            record["validation_accuracy"] = accuracy
            record["failures"] += _failure_records({c: f"validation: {cause}" for c, cause in failures.items()})
            downlink_bytes += len(validating) * len(payload)
        record |= {
            "uplink_bytes": sum(client["uplink_bytes"] for client in client_records),
            "refused_bytes": refused_bytes,
            "downlink_bytes": downlink_bytes,
            "nonzero_ratio": {name: nonzero_ratio(state[f"{name}.weight"]) for name in sparse},
            "mask_overlap": {name.removesuffix(".weight"): overlap for name, overlap in masks.overlap().items()},
            "seconds": time.perf_counter() - started,
        }
        if sparse and experiment.snapshot_every and (last or round % experiment.snapshot_every == 0):
            save_snapshot(directory, round, {name: state[f"{name}.weight"] for name in sparse})
        made = Checkpoint(round, state, optimizer_state, data_sha256, (*earlier, now))
        save_round(directory, record, client_records, made)
        on_round(record)
    more = {"data_sha256": data_sha256, "flops_a_sample": training_flops(experiment, dataset)._asdict()}
    if earlier:  # a run that went on with other code than it began with
        more["code"] = code() | {"earlier_sources_sha256": list(earlier)}
    finish_run(directory, state, schema.dense_bytes, more)


def _state_of(
    checkpoint: Checkpoint, schema: Schema, optimizer: ServerOptimizer, directory: Path
) -> tuple[State, State, int]:
    """The model's state in its own order, the optimiser's, and the last whole round."""

    def described(state: State) -> dict[str, tuple[torch.Size, torch.dtype]]:
        return {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()}

    where = f"{directory / CHECKPOINT}: expected the experiment's model"
    fix = "restore the file, or move the run's folder away and run it again"
    if described(checkpoint.state) != {name: (shape, dtype) for name, shape, dtype in schema.tensors}:
        raise ResultsError(f"{where}, but its tensors have other names, shapes or types; {fix}")
    state = {spec.name: checkpoint.state[spec.name] for spec in schema.tensors}
    if described(checkpoint.optimizer_state) != described(optimizer.init(state)):
        raise ResultsError(f"{where}, but the optimiser's tensors have other names, shapes or types; {fix}")
    for name, tensor in (*state.items(), *checkpoint.optimizer_state.items()):
        if not tensor.isfinite().all():
            raise ResultsError(f"{where}, but {name} holds non-finite values (NaN or infinity); {fix}")
    return state, checkpoint.optimizer_state, checkpoint.round


def _server_optimizer(experiment: Experiment, parameters: list[str]) -> ServerOptimizer:
    if experiment.server_optimizer == "fedavg":
        return fedavg()
    return fedadam(
        parameters, experiment.server_lr, experiment.server_beta_1, experiment.server_beta_2, experiment.server_tau
    )


def _clients(experiment: Experiment) -> tuple[int, set[int]]:
    """How many samples any client can have, and the clients that hold some out for validation.

    A client may be too small to hold anything out: it has no part in the validation. With data of their own only the
    nodes know.
    """
    e = experiment
    if e.partition == "node":
        return MOST_EXAMPLES, set(range(e.clients))
    samples = [len(part) for part in client_indices(e.dataset, e.root, e.partition, e.clients, e.alpha, e.seed)]
    return max(samples), {k for k, count in enumerate(samples) if held_out_count(count, e.validation_fraction)}


def _wait_for_nodes(grid: Grid, experiment: Experiment) -> dict[int, int]:
    """A node id for every client, once so many are there: on Ray and in a deployment they come up beside the server."""
    started = time.monotonic()
    deadline, next_word = started + experiment.reply_timeout_seconds, started + FIRST_WORD_SECONDS
    while len(nodes := nodes_by_client({}, grid.get_node_ids(), experiment.clients)) < experiment.clients:
        if time.monotonic() > deadline:
            raise RoundError(
                f"the experiment has {experiment.clients} clients, but only {len(nodes)} nodes came within "
                f"{experiment.reply_timeout_seconds:g} s; {_more_nodes(len(nodes), experiment)}"
            )
        if time.monotonic() > next_word:
            _log.warning(
                "waiting for nodes: %d of %d are there, a node for each client; %s",
                len(nodes), experiment.clients, _more_nodes(len(nodes), experiment),
            )  # fmt: skip
            next_word = time.monotonic() + NEXT_WORD_SECONDS
        time.sleep(0.1)
    return nodes


def _more_nodes(there: int, experiment: Experiment) -> str:
    """What to do about nodes that are not there."""
    clients = experiment.clients
    fewer = f"clients={there} clients_per_round={min(there, experiment.clients_per_round)}"
    return (
        f"in a simulation, flwr run with --federation-config 'num-supernodes={clients}'; in a deployment, start "
        f"{clients - there} more SuperNodes" + (f"; or set {fewer} in the run config" if there else "")
    )


def nodes_by_client(before: Mapping[int, int], node_ids: Iterable[int], clients: int) -> dict[int, int]:
    """The node that is each client, of those that are there. An instruction tells a node which client it is to be.

    A node stays the client that it was `before`; a client whose node is gone gets one of those that have newly come, in
    the order of their ids, and is left out where there is none.
    """
    there = set(node_ids)
    nodes = {client: node for client, node in before.items() if node in there}
    new = sorted(there - set(nodes.values()))
    vacant = (client for client in range(clients) if client not in nodes)
    return dict(sorted((nodes | dict(zip(vacant, new, strict=False))).items()))


def _exchange(
    grid: Grid,
    message_type: str,
    payload: bytes,
    nodes: dict[int, int],
    clients: list[int],
    round: int,
    experiment: Experiment,
) -> tuple[Replies, dict[int, str]]:
    """Send the model to the clients; returns their replies in client order, and why the others gave none."""
    timeout = experiment.reply_timeout_seconds
    failures = {
        client: f"no reply within {timeout:g} s" if client in nodes else "its node is gone" for client in clients
    }
    clients = [client for client in clients if client in nodes]
    client_of = {nodes[client]: client for client in clients}
    contents = instructions(payload, experiment, round, clients)
    messages = [
        Message(content, nodes[client], message_type, group_id=str(round))
        for client, content in zip(clients, contents, strict=True)
    ]
    replies: dict[int, Message] = {}
    for reply in grid.send_and_receive(messages, timeout=timeout):
        client = client_of.pop(reply.metadata.src_node_id, None)
        if client is None:
            continue  # from nobody who was asked, or a second one
        if reply.has_error():
            failures[client] = str(reply.error.reason or f"error {reply.error.code}")
        else:
            failures.pop(client)
            replies[client] = reply
    return sorted(replies.items()), failures


def _sum_updates(
    replies: Replies,
    failures: dict[int, str],
    state: State,
    schema: Schema,
    adds: bool,
    most_examples: int,
    round: int,
) -> tuple[Average, MaskCounts, list[Record], int]:
    """Decode and add the updates in client order; returns their sum, their masks, a record for each, and refused bytes.

    A client whose reply is malformed is put to the failures, with the cause, and the bytes of its payload count as
    refused: they are no part of what the updates took.
    """
    average, masks = Average(state), MaskCounts()
    records: list[Record] = []
    refused_bytes = 0
    for client, reply in replies:
        payload = b""
        try:
            payload = read_payload(reply)
            metrics = read_metrics(reply, most_examples)
            update = decode(payload, schema)
            if update.adds != adds:
                kinds = {False: "weights", True: "changes"}
                raise ValueError(f"the update holds {kinds[update.adds]}, the experiment's uplink sends {kinds[adds]}")
        except ValueError as error:
            failures[client] = f"{type(error).__name__}: {error}"
            refused_bytes += len(payload)
            continue
        average.add(update, int(metrics["num-examples"]))
        masks.add(update)
        records.append(_client_record(round, client, metrics, len(payload)))
    return average, masks, records, refused_bytes


def _test(model: torch.nn.Module, state: State, dataset: Dataset) -> Record:
    device = dataset.test.images.device
    model.load_state_dict({name: tensor.to(device) for name, tensor in state.items()}, assign=True)
    loss, accuracy = evaluate(model, dataset.test, dataset)
    # JSON has no number for what a diverged model gives.
    return {"test_loss": loss if math.isfinite(loss) else None, "test_accuracy": accuracy}


def _validate(
    grid: Grid,
    payload: bytes,
    nodes: dict[int, int],
    clients: list[int],
    round: int,
    experiment: Experiment,
    most_examples: int,
) -> tuple[float | None, dict[int, str]]:
    """The new model's accuracy on the validation samples of the round's clients, weighted by their number."""
    replies, failures = _exchange(grid, MessageType.EVALUATE, payload, nodes, clients, round, experiment)
    records: list[Record] = []
    for client, reply in replies:
        try:
            metrics = read_metrics(reply, most_examples)
            records.append({"num-examples": metrics["num-examples"], "accuracy": _figure(metrics, "accuracy")})
        except ValueError as error:
            failures[client] = f"{type(error).__name__}: {error}"
    return _mean(records, "accuracy"), failures


def _client_record(round: int, client: int, metrics: Record, uplink_bytes: int) -> Record:
    record = {"round": round, "client": client, "uplink_bytes": uplink_bytes, "num-examples": metrics["num-examples"]}
    return record | {key: _figure(metrics, key) for key in CLIENT_FIGURES}


CLIENT_FIGURES = ("train_loss", "train_seconds", "train_cpu_seconds", "realised_sparsity")

# What a client reports beside its update is as little to be trusted: a figure above these, or below 0, is none.
_LARGEST = dict.fromkeys(("train_loss", "train_seconds", "train_cpu_seconds"), 1e9) | dict.fromkeys(
    ("realised_sparsity", "accuracy"), 1.0
)


def _figure(metrics: Record, key: str) -> float | None:
    value = metrics.get(key)
    return value if value is not None and 0 <= value <= _LARGEST[key] else None


def _failure_records(failures: dict[int, str]) -> list[Record]:
    return [{"client": client, "cause": _printable(cause)} for client, cause in sorted(failures.items())]


def _printable(cause: str) -> str:
    """A client's words, at most 300 characters of them, without what a terminal would obey."""
    text = "".join(character if character.isprintable() else " " for character in cause[:1000])
    return text if len(text) <= 300 else text[:299] + "…"


def _mean(records: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """The mean of a figure, weighted by samples, over the clients that report it; None if none does."""
    values = [(record[key], record["num-examples"]) for record in records if record[key] is not None]
    examples = sum(examples for _, examples in values)
    return float(sum(value * examples for value, examples in values) / examples) if values else None


def _too_few(round: int, good: int, experiment: Experiment, failures: dict[int, str]) -> str:
    clients_of: dict[str, list[str]] = {}
    for client, cause in sorted(failures.items()):
        clients_of.setdefault(_printable(cause), []).append(str(client))
    causes = "; ".join(f"client {', '.join(clients)}: {cause}" for cause, clients in clients_of.items())
    return (
        f"round {round}: {good} of {experiment.clients_per_round} clients sent a usable update, min_replies = "
        f"{experiment.min_replies} are needed. {causes}"
    )
