"""ZeroFL's uplink in somebody else's Flower app: a mod on the client, a strategy around the app's own on the server.

    app = ClientApp(mods=[uplink_mod(sparsity=0.9, mask_ratio=0.2)])         # with zerofl.sparsify_(model, 0.9) in it
    SparseUplink(FedAvg(...)).start(...)

The app's model travels down as before; what comes up is ZeroFL's payload, which the server decodes before the app's
strategy sees it.
"""

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from numbers import Integral, Real

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from zerofl.exchange.robust import clipped
from zerofl.exchange.update import Sparse, State, Update
from zerofl.exchange.uplink import UPLINKS, make_update, tied
from zerofl.exchange.wire import VALUES, Received, Schema, decode, encode, received_model, schema_of
from zerofl.exchange.wrappers import differing_names, wrapper_hint
from zerofl.fl.records import savings
from zerofl.flower.messages import PAYLOAD_STYPE, payload_record, read_payload
from zerofl.rng import rng
from zerofl.sparse.default_layers import default_by_shape

CallNext = Callable[[Message, Context], Message]
Mod = Callable[[Message, Context, CallNext], Message]

# With this key in the configuration Flower's mods clip on the client, for differential privacy.
CLIPPING_NORM = "clipping_norm"
_log = logging.getLogger("flwr")  # Flower's own, which shows its lines wherever the app runs


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
        uplink: one of `zerofl.exchange.uplink.UPLINKS`.
        sparsity: that of `sparsify_`; the top (1 - sparsity + mask_ratio) of each sparse layer is sent.
        mask_ratio: how much more than the top K is sent.
        layers: the names that `sparsify_` returned, or full names of arrays ("0", "lstm.weight_hh_l0"). Default: those
            that `sparsify_` takes by default, by the shapes of the kernels and matrices named `weight` (see
            `zerofl.sparse.default_layers`). With layers of other kinds whose weights look alike (an embedding, a
            transposed convolution, attention), or two that share one, give the names.
        values: one of `zerofl.exchange.wire.VALUES`.
        seed: of the rounding of int8.

    Tied weights (`decoder.weight = encoder.weight`), which a state has under each of their names, stay equal: they get
    one choice of entries, the sparse one if `layers` names any of them; by default they are sent whole if one of them
    would be. Both names travel. `zerofl.exchange.uplink.tied` says how they are recognised.

    Raises:
        ValueError: an unknown uplink or values, a fraction or seed that is none or out of range, or layers that are no
            list of names. A message that does not fit makes the client answer with an error: not exactly one
            ArrayRecord, arrays other than float32 and int64, a layer that is not there or no weight, no array to send a
            part of, a trained model with other names, tied weights that came with different values, or an uplink that
            would break a client-side clipping bound.
    """
    if not _is_one_of(uplink, UPLINKS) or not _is_one_of(values, VALUES):
        raise ValueError(f"uplink = {uplink!r}, values = {values!r}: expected of {[*UPLINKS]} and {[*VALUES]}")
    if not (_is_number(sparsity) and 0 <= sparsity < 1 and _is_number(mask_ratio) and 0 <= mask_ratio <= 1):
        raise ValueError(
            f"sparsity = {sparsity!r}, mask_ratio = {mask_ratio!r}: expected fractions in [0, 1) and [0, 1]"
        )
    if not isinstance(seed, Integral) or seed < 0:
        raise ValueError(f"seed = {seed!r}: expected a whole number, 0 or more")
    named = None if layers is None else _list_of_names(layers)

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
        _sparse_names(uplink, named, record.to_torch_state_dict())  # so that what is wrong is said before training
        reply = call_next(message, context)
        if reply.has_error():
            return reply
        received = record.to_torch_state_dict()
        key, trained_record = _only_arrays(reply)
        if any(array.stype == PAYLOAD_STYPE for array in trained_record.values()):
            raise ValueError("the reply is an update already: list uplink_mod once in the client app's mods")
        trained = trained_record.to_torch_state_dict()
        if trained.keys() != received.keys():
            raise ValueError(f"the reply's model {differing_names(trained, received)}")
        sparse = _sparse_names(uplink, named, received, trained)
        schema = schema_of(received)
        update = make_update(uplink, received, trained, sparse, sparsity, mask_ratio)
        came, generator = received_model(received, schema), rng(seed, _round(message), context.node_id, "int8")
        reply.content[key] = payload_record(encode(update, schema, values=values, received=came, generator=generator))
        return reply

    return mod


def _is_one_of(value: object, choices: Iterable[str]) -> bool:
    return isinstance(value, str) and value in choices


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _list_of_names(layers: object) -> list[str]:
    if isinstance(layers, str):
        raise ValueError(f"layers = {layers!r}: expected a list of names; did you mean [{layers!r}]?")
    names = list(layers) if isinstance(layers, Iterable) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"layers = {layers!r}: expected a list of names, those that sparsify_ returned or the arrays'; to send the "
            "whole model say uplink = 'full'"
        )
    return names


def _sparse_names(uplink: str, named: list[str] | None, received: State, trained: State | None = None) -> list[str]:
    """The arrays to send a part of: those named, or by default those of `sparse_by_shape`, tied ones being dense."""
    if named is not None:
        arrays = [name if (name := f"{layer}.weight") in received else layer for layer in named]
        if missing := [layer for layer, name in zip(named, arrays, strict=True) if name not in received]:
            wanted = [f"{layer}.weight" for layer in missing]
            raise ValueError(
                f"layers: the model that came has neither {' nor '.join(missing)} nor {', '.join(wanted)}"
                f"{wrapper_hint(received, wanted)}; it has {', '.join(received)}"
            )
        if flat := [name for name in arrays if received[name].dim() < 2 or not received[name].is_floating_point()]:
            raise ValueError(f"layers: {', '.join(flat)} is no weight of a layer that sparsify_ takes")
        return arrays
    arrays = sparse_by_shape(received)
    if trained is not None:
        first_of = tied(received, trained)
        dense = {first_of[name] for name in received if name not in arrays}
        arrays = [name for name in arrays if first_of[name] not in dense]
    if not arrays and uplink != "full":
        large = sorted(received, key=lambda name: received[name].numel(), reverse=True)
        examples = [name for name in large if received[name].dim() > 1 and received[name].is_floating_point()][:2]
        named_so = f", for example uplink_mod(layers={examples}, ...)" if examples else ""
        raise ValueError(
            "there is no array to send a part of: looked for kernels above 1x1 and matrices named weight, except the "
            f"first kernel and the last matrix, in {_described(received)}. Name the layers or the arrays{named_so}, or "
            "send the whole model with uplink = 'full'"
        )
    return arrays


def _described(state: State) -> str:
    return ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in state.items()) or "a model without arrays"


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
    one of these (put SparseUplink outermost). Afterwards `uplink_bytes` has the bytes that came up in each round, which
    Flower's log also shows, beside those of whole models.
    A reply that is no well-formed update is left out, with a warning that names the node and the cause. Integer arrays,
    which averaging makes floats, are rounded back.

    Args:
        strategy: the other.
        clip_norm: to which the norm of an update's change is clipped before it becomes a whole model; 0 is not at all.
        clip_median: the same for each array, as a multiple of the median of the round's norms. The log names who was
            clipped. See `zerofl.exchange.robust.clipped`; for a trimmed mean let the other be Flower's FedTrimmedAvg.

    Raises:
        TypeError: no strategy of `flwr.serverapp.strategy`, such as an old one of `flwr.server.strategy`.
        ValueError: a SparseUplink, or a clipping bound that is none.
    """

    def __init__(self, strategy: Strategy, *, clip_norm: float = 0.0, clip_median: float = 0.0) -> None:
        if not isinstance(strategy, Strategy):
            raise TypeError(_no_strategy(strategy))
        if isinstance(strategy, SparseUplink):
            raise ValueError("SparseUplink around SparseUplink: the inner one would find no updates; use it once")
        for name, value in (("clip_norm", clip_norm), ("clip_median", clip_median)):
            if not (_is_number(value) and 0 <= value <= sys.float_info.max):
                raise ValueError(f"{name} = {value!r}: expected 0 or a positive number")
        self.strategy = strategy
        self._clip_norm, self._clip_median = clip_norm, clip_median
        self.uplink_bytes: dict[int, int] = {}
        self._received: State = {}
        self._schema = Schema(())
        self._sent: dict[int, ArrayRecord] = {}

    def summary(self) -> None:
        """Log the other strategy's configuration."""
        self.strategy.summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """What the other sends; the models are kept to decode the replies with."""
        self._received = arrays.to_torch_state_dict()
        self._schema = schema_of(self._received)
        messages = list(self.strategy.configure_train(server_round, arrays, config, grid))
        self._sent = {
            message.metadata.dst_node_id: record
            for message in messages
            for record in message.content.array_records.values()  # one, or the client refuses
        }
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The other's aggregate of the decoded models."""
        replies, sizes, decoded = list(replies), list[int](), list[Message]()
        models = dict[
            int, Received
        ]()  # by their record's identity, which is one for all nodes unless the other has many

        def updates() -> Iterator[tuple[Update, Message]]:
            for reply in replies:
                try:
                    if not reply.has_error():
                        payload = read_payload(reply)
                        record = self._sent.get(reply.metadata.src_node_id)
                        if record is not None and id(record) not in models:
                            models[id(record)] = received_model(record.to_torch_state_dict(), self._schema)
                        yield decode(payload, self._schema, models.get(id(record))), reply
                        sizes.append(len(payload))  # of the updates that are used, as in a run's records
                    decoded.append(reply)
                except ValueError as error:
                    node = reply.metadata.src_node_id
                    _log.warning("round %d: the update of node %d is left out: %s", server_round, node, error)

        for update, reply, clip in clipped(self._received, updates(), self._clip_norm, self._clip_median):
            (key,) = reply.content.array_records
            reply.content[key] = ArrayRecord(whole_model(update, self._received))
            if clip and clip.factor < 1:
                node = reply.metadata.src_node_id
                _log.info(
                    "round %d: the change of node %d, of norm %.3g, is clipped to %.3g of it", server_round, node, *clip
                )
        self.uplink_bytes[server_round] = sum(sizes)
        if sum(sizes):
            whole, times = self._schema.dense_bytes, savings(self._schema.dense_bytes, len(sizes), sum(sizes))
            _log.info(
                "round %d: %d updates came up in %.2f MB; whole models are %.2f MB, %.1f times as much",
                server_round, len(sizes), sum(sizes) / 1e6, len(sizes) * whole / 1e6, times,
            )  # fmt: skip
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


def _no_strategy(given: object) -> str:
    kind = given if isinstance(given, type) else type(given)
    name, hint = kind.__name__, ""
    if issubclass(kind, Strategy):
        hint = f"; did you mean SparseUplink({name}(...))?"
    elif any(base.__module__.startswith("flwr.server.") for base in kind.__mro__):
        hint = f": {name} of flwr.server.strategy is one of the old ones, which a ServerApp's messages do not fit"
    return f"SparseUplink({kind.__module__}.{name}): expected a strategy of flwr.serverapp.strategy{hint}"


def whole_model(update: Update, received: State) -> State:
    """The model that an update stands for: what was not sent is zero, or with changes as it was received."""
    model: State = {}
    for name, sent in update.tensors.items():
        tensor = sent.to_dense() if isinstance(sent, Sparse) else sent
        model[name] = received[name] + tensor if update.adds and tensor.is_floating_point() else tensor
    return model


def _with_types_of(arrays: ArrayRecord, received: State) -> ArrayRecord:
    """The aggregate with the types that were sent out."""
    if more := [name for name in arrays if name not in received]:
        raise ValueError(
            f"the strategy within SparseUplink gave back {', '.join(more)}, which it was not given; expected "
            f"{', '.join(received)}"
        )
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
