"""The client: receive the model, train it with SWAT on its own data, send a sparse part back (Algorithm 1)."""

import dataclasses
import functools
import logging
import time
from collections.abc import Callable
from functools import lru_cache

import torch
from flwr.app import Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from zerofl.data import Dataset, client_indices, dataset_on
from zerofl.data.partition import validation_split
from zerofl.exchange.uplink import State, make_update
from zerofl.exchange.wire import Schema, decode_state, encode, schema_of
from zerofl.experiment import Experiment
from zerofl.fl.train import empty_model, evaluate, train
from zerofl.flower.messages import read_instruction, train_reply
from zerofl.rng import rng
from zerofl.sparse.layers import realised_sparsity, sparse_layers

CLIENT_APP_RAISED_EXCEPTION = 2  # Flower's error code for it
_log = logging.getLogger(__name__)

Handler = Callable[[Message, Context], Message]

app = ClientApp()


def _failures_as_replies(handler: Handler) -> Handler:
    """Answer an exception with an error that reads the same on every engine (Ray's own carries process numbers)."""

    @functools.wraps(handler)
    def handle(message: Message, context: Context) -> Message:
        try:
            return handler(message, context)
        except Exception as error:
            _log.debug("a client failed", exc_info=True)
            reason = f"{type(error).__name__}: {error}"
            return Message(Error(CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)

    return handle


@app.train()
@_failures_as_replies
def _train(message: Message, context: Context) -> Message:
    payload, experiment, round, client = read_instruction(message)
    experiment = _at_node(experiment, context)
    torch.set_num_threads(experiment.threads)
    dataset, (training, _) = _client_data(experiment, client)
    model = empty_model(experiment, dataset)
    schema = schema_of(model.state_dict())
    received = _decode_state(payload, schema, experiment.device)
    model.load_state_dict({name: tensor.clone() for name, tensor in received.items()}, assign=True)

    started, cpu_started = time.perf_counter(), time.process_time()
    split = dataset.train.take(training)
    train_loss = train(model, split, dataset, experiment, round=round, client=client)
    train_seconds, train_cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started

    trained = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    sparse = {f"{name}.weight": layer.weight.numel() for name, layer in sparse_layers(model)}
    update = make_update(experiment.uplink, received, trained, sparse, experiment.sparsity, experiment.mask_ratio)
    metrics: dict[str, int | float] = {
        "num-examples": len(training),
        "train_loss": train_loss,
        "train_seconds": train_seconds,
        "train_cpu_seconds": train_cpu_seconds,  # of all threads: other programs on the machine do not count
    }
    if sparse:
        realised = realised_sparsity(model)
        metrics["realised_sparsity"] = sum(
            realised[name] * layer.weight.numel() for name, layer in sparse_layers(model)
        ) / sum(sparse.values())
    sent = encode(
        update,
        schema,
        values=experiment.uplink_values,
        positions=experiment.uplink_positions,
        generator=rng(experiment.seed, round, client, "int8"),
    )
    return Message(train_reply(sent, metrics), reply_to=message)


@app.evaluate()
@_failures_as_replies
def _evaluate(message: Message, context: Context) -> Message:
    payload, experiment, _, client = read_instruction(message)
    experiment = _at_node(experiment, context)
    torch.set_num_threads(experiment.threads)
    dataset, (_, validation) = _client_data(experiment, client)
    if not len(validation):
        raise ValueError("it has no validation samples; raise validation_fraction, or set validate_every = 0")
    model = empty_model(experiment, dataset)
    model.load_state_dict(_decode_state(payload, schema_of(model.state_dict()), experiment.device), assign=True)
    loss, accuracy = evaluate(model, dataset.train.take(validation), dataset)
    metrics = MetricRecord({"num-examples": len(validation), "loss": loss, "accuracy": accuracy})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


def _at_node(experiment: Experiment, context: Context) -> Experiment:
    """The experiment with this node's own folder of data, if its --node-config names one as `root`."""
    root = context.node_config.get("root", experiment.root)
    if not isinstance(root, str):
        raise ValueError(f"--node-config: root = {root!r}: expected the folder of the data, in quotes")
    return dataclasses.replace(experiment, root=root)


def _client_data(experiment: Experiment, client: int) -> tuple[Dataset, tuple[Tensor, Tensor]]:
    """The data set, and the client's training and validation indices into its training part."""
    e = experiment
    dataset = dataset_on(e.dataset, e.root, e.device)
    mine = client_indices(e.dataset, e.root, e.partition, e.clients, e.alpha, e.seed)[client]
    if not len(mine):
        raise ValueError(f"{e.dataset}: {e.root} has no training part; add one")
    return dataset, validation_split(mine, e.validation_fraction, e.seed, client)


@lru_cache(maxsize=1)
def _decode_state(payload: bytes, schema: Schema, device: str) -> State:
    """The broadcast model on a device, once for all clients this process trains in a round; nobody may change it."""
    return {name: tensor.to(device) for name, tensor in decode_state(payload, schema).items()}
