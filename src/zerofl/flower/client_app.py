"""The client as a Flower app: it unpacks a message, has `zerofl.fl.client` do the work, and packs the answer."""

import dataclasses
import logging
import threading
from collections.abc import Callable
from functools import lru_cache, wraps

import torch
from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from zerofl.data import Dataset, dataset_on, load_dataset
from zerofl.exchange.update import State
from zerofl.exchange.wire import Received, Schema, decode_state, received_model, schema_of
from zerofl.experiment import Experiment
from zerofl.fl.client import encode_update, train_client, validate_client
from zerofl.fl.train import empty_model
from zerofl.flower.messages import read_instruction, train_reply, validation_reply

CLIENT_APP_RAISED_EXCEPTION = 2  # Flower's error code for it
SIDE_BY_SIDE = "side-by-side"
"""In the configuration of nodes of one process, of which several train at the same time."""
_log = logging.getLogger(__name__)

Handler = Callable[[Message, Context], Message]

app = ClientApp()


def _failures_as_replies(handler: Handler) -> Handler:
    """Answer an exception with an error that reads the same on every engine (Ray's own carries process numbers)."""

    @wraps(handler)
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
    experiment, dataset, state = _at_node(experiment, context, payload)
    update, record = train_client(
        state, dataset, experiment, round, client, side_by_side=SIDE_BY_SIDE in context.node_config
    )
    with _loading:
        received = _received_model(payload, _schema(experiment), experiment.device)
    sent = encode_update(update, _schema(experiment), received, experiment, round, client)
    return Message(train_reply(sent, record), reply_to=message)


@app.evaluate()
@_failures_as_replies
def _evaluate(message: Message, context: Context) -> Message:
    payload, experiment, _, client = read_instruction(message)
    experiment, dataset, received = _at_node(experiment, context, payload)
    validation, loss = validate_client(received, dataset, experiment, client)
    return Message(validation_reply(validation, loss), reply_to=message)


def _at_node(experiment: Experiment, context: Context, payload: bytes) -> tuple[Experiment, Dataset, State]:
    """The experiment with this node's own folder of data, if its --node-config names one as `root`; data and model."""
    root = context.node_config.get("root", experiment.root)
    if not isinstance(root, str):
        raise ValueError(f"--node-config: root = {root!r}: expected the folder of the data, in quotes")
    experiment = dataclasses.replace(experiment, root=root)
    torch.set_num_threads(experiment.threads)
    with _loading:
        dataset = dataset_on(experiment.dataset, experiment.root, experiment.device)
        return experiment, dataset, _decode_state(payload, _schema(experiment), experiment.device)


_loading = threading.Lock()  # so that of clients side by side the first one loads, and the others find it done


@lru_cache(maxsize=1)
def _schema(experiment: Experiment) -> Schema:
    """That of the experiment's model."""
    return schema_of(empty_model(experiment, load_dataset(experiment.dataset, experiment.root)).state_dict())


@lru_cache(maxsize=1)
def _decode_state(payload: bytes, schema: Schema, device: str) -> State:
    """The broadcast model on a device, once for all clients this process trains in a round; nobody may change it."""
    return {name: tensor.to(device) for name, tensor in decode_state(payload, schema).items()}


@lru_cache(maxsize=1)
def _received_model(payload: bytes, schema: Schema, device: str) -> Received:
    """The same as updates refer to it, once for all of them."""
    return received_model(_decode_state(payload, schema, device), schema)
