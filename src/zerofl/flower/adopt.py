"""ZeroFL's uplink in somebody else's Flower app: a mod on the client, a strategy around the app's own on the server.

    app = ClientApp(mods=[uplink_mod(sparsity=0.9, mask_ratio=0.2)])         # with zerofl.sparsify_(model, 0.9) in it
    SparseUplink(FedAvg(...)).start(...)

The app's model travels down as before; what comes up is ZeroFL's payload, which the server decodes before the app's
strategy sees it.
"""

import logging
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from zerofl.default_layers import default_by_shape
from zerofl.flower.messages import PAYLOAD_STYPE, payload_record, read_payload
from zerofl.rng import rng
from zerofl.uplink import UPLINKS, Sparse, State, Update, make_update
from zerofl.wire import VALUES, Schema, decode, encode, schema_of

CallNext = Callable[[Message, Context], Message]
Mod = Callable[[Message, Context, CallNext], Message]

# With this key in the configuration Flower's mods clip on the client, for differential privacy.
CLIPPING_NORM = "clipping_norm"
_log = logging.getLogger(__name__)


def uplink_mod(
    uplink: str = "top_k_weights_diff",
    *,
    sparsity: float,
    mask_ratio: float = 0.0,
    layers: Iterable[str] | None = None,
    values: str = "float32",
    seed: int = 0,
) -> Mod:
    """A mod for `ClientApp(mods=[...])` that sends a sparse part of what the app trained (Algorithm 1).

    Put it first: mods listed after it, such as Flower's clipping or noise, act on the whole model before. The server
    needs `SparseUplink` around its strategy.

    Args:
        uplink: one of `zerofl.uplink.UPLINKS`.
        sparsity: that of `sparsify_`; the top (1 - sparsity + mask_ratio) of each sparse layer is sent.
        mask_ratio: how much more than the top K is sent.
        layers: the names that `sparsify_` returned. Default: those that it takes by default, told by the shapes of the
            kernels and matrices named `weight` (see `zerofl.default_layers`). With layers of other kinds whose weights
            look alike (an embedding, a transposed convolution, attention), or two that share one, give the names.
        values: one of `zerofl.wire.VALUES`.
        seed: of the rounding of int8.

    Raises:
        ValueError: an unknown uplink or values, a fraction out of range, or layers that are one text. A message that
            does not fit makes the client answer with an error: not exactly one ArrayRecord, arrays other than float32
            and int64, a layer that is not there or no weight, or an uplink that would break a client-side clipping
            bound.
    """
    if uplink not in UPLINKS or values not in VALUES:
        raise ValueError(f"uplink = {uplink!r}, values = {values!r}: expected of {[*UPLINKS]} and {[*VALUES]}")
    if not 0 <= sparsity < 1 or not 0 <= mask_ratio <= 1:
        raise ValueError(f"sparsity = {sparsity}, mask_ratio = {mask_ratio}: expected fractions in [0, 1) and [0, 1]")
    if isinstance(layers, str):
        raise ValueError(f"layers = {layers!r}: expected a list of names; did you mean [{layers!r}]?")
    names = None if layers is None else [f"{layer}.weight" for layer in layers]

    def mod(message: Message, context: Context, call_next: CallNext) -> Message:
        if message.metadata.message_type.partition(".")[0] != MessageType.TRAIN:
            return call_next(message, context)
        _, record = _only_arrays(message)
        clipped = any(CLIPPING_NORM in config for config in message.content.config_records.values())
        if clipped and (not UPLINKS[uplink].adds or values != "float32"):
            raise ValueError(
                f"uplink = {uplink!r}, values = {values!r} would change a clipped update beyond its bound: with "
                "client-side clipping use diff_on_top_k_weights or top_k_weights_diff, and float32"
            )
        reply = call_next(message, context)
        if reply.has_error():
            return reply
        received = record.to_torch_state_dict()
        key, trained_record = _only_arrays(reply)
        if any(array.stype == PAYLOAD_STYPE for array in trained_record.values()):
            raise ValueError("the reply is an update already: list uplink_mod once in the client app's mods")
        trained = trained_record.to_torch_state_dict()
        sparse = sparse_by_shape(received) if names is None else names
        if missing := [name for name in sparse if name not in received]:
            raise ValueError(f"layers: the model that came has no {', '.join(missing)}; it has {', '.join(received)}")
        if flat := [name for name in sparse if received[name].dim() < 2]:
            raise ValueError(f"layers: {', '.join(flat)} is no weight of a layer that sparsify_ takes")
        schema = schema_of(received)
        update = make_update(uplink, received, trained, sparse, sparsity, mask_ratio)
        generator = rng(seed, _round(message), context.node_id, "int8")
        reply.content[key] = payload_record(encode(update, schema, values=values, generator=generator))
        return reply

    return mod


def sparse_by_shape(state: Mapping[str, torch.Tensor]) -> list[str]:
    """The tensors that `sparsify_` would make sparse by default, as far as their shapes tell."""
    return default_by_shape(
        {
            name: tensor.shape
            for name, tensor in state.items()
            if name.rpartition(".")[2] == "weight" and tensor.dim() in (2, 4)
        }
    )


class SparseUplink(Strategy):
    """A strategy around another: it decodes what `uplink_mod` sent, and gives the whole models to the other one.

    The other may be any that aggregates models: Flower's own, one of yours, or Flower's differential privacy around
    one of these (put SparseUplink outermost). Afterwards `uplink_bytes` has the bytes that came up in each round.
    A reply that is no well-formed update is left out, with a warning that names the node and the cause. Integer arrays,
    which averaging makes floats, are rounded back.
    """

    def __init__(self, strategy: Strategy) -> None:
        if isinstance(strategy, SparseUplink):
            raise ValueError("SparseUplink around SparseUplink: the inner one would find no updates; use it once")
        self.strategy = strategy
        self.uplink_bytes: dict[int, int] = {}
        self._received: State = {}
        self._schema = Schema(())

    def summary(self) -> None:
        """Log the other strategy's configuration."""
        self.strategy.summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """What the other sends; the model is kept to decode the replies with."""
        self._received = arrays.to_torch_state_dict()
        self._schema = schema_of(self._received)
        return self.strategy.configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The other's aggregate of the decoded models."""
        self.uplink_bytes[server_round] = 0
        replies = list(replies)
        decoded = [message for reply in replies if (message := self._decoded(server_round, reply)) is not None]
        if len(decoded) < len(replies) and all(reply.has_error() for reply in decoded):
            _log.error(
                "round %d: no reply holds an update, so nothing was learnt; does the client app have "
                "ClientApp(mods=[uplink_mod(...)])?",
                server_round,
            )
        arrays, metrics = self.strategy.aggregate_train(server_round, decoded)
        return None if arrays is None else _with_types_of(arrays, self._received), metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """What the other sends."""
        return self.strategy.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """The other's aggregate."""
        return self.strategy.aggregate_evaluate(server_round, replies)

    def _decoded(self, server_round: int, reply: Message) -> Message | None:
        if reply.has_error():
            return reply
        try:
            payload = read_payload(reply)
            self.uplink_bytes[server_round] += len(payload)
            update = decode(payload, self._schema)
        except ValueError as error:
            node = reply.metadata.src_node_id
            _log.warning("round %d: the update of node %d is left out: %s", server_round, node, error)
            return None
        (key,) = reply.content.array_records
        reply.content[key] = ArrayRecord(whole_model(update, self._received))
        return reply


def whole_model(update: Update, received: State) -> State:
    """The model that an update stands for: what was not sent is zero, or with changes as it was received."""
    model: State = {}
    for name, sent in update.tensors.items():
        tensor = sent.to_dense() if isinstance(sent, Sparse) else sent
        model[name] = received[name] + tensor if update.adds and tensor.is_floating_point() else tensor
    return model


def _with_types_of(arrays: ArrayRecord, received: State) -> ArrayRecord:
    """The aggregate with the types that were sent out."""
    typed = {}
    for name, array in arrays.items():
        values = array.numpy()
        dtype = received[name].numpy().dtype
        typed[name] = Array(np.asarray(np.rint(values) if dtype.kind == "i" else values, dtype))
    return ArrayRecord(typed)


def _only_arrays(message: Message) -> tuple[str, ArrayRecord]:
    records = list(message.content.array_records.items())
    if len(records) != 1:
        raise ValueError(f"a message for the uplink holds {len(records)} ArrayRecords, expected one with the model")
    return records[0]


def _round(message: Message) -> int:
    """The round that Flower's strategies put into the configuration; 0 without it."""
    rounds = [config["server-round"] for config in message.content.config_records.values() if "server-round" in config]
    return rounds[0] if rounds and isinstance(rounds[0], int) else 0
