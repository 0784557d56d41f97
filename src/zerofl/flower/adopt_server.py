"""ZeroFL's uplink in somebody else's Flower app, on the server: a strategy around the app's own.

    SparseUplink(FedAvg(...)).start(...)

What came up is ZeroFL's payload (`zerofl.flower.adopt_client`), which is decoded before the app's strategy sees it. The
app's model travels down as before, or packed.
"""

import logging
import sys
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from zerofl.exchange.robust import clipped
from zerofl.exchange.rounded import put_back, rounding
from zerofl.exchange.update import Sparse, State, Update
from zerofl.exchange.wire import VALUES, Received, Schema, decode, received_model, schema_of
from zerofl.fl.records import savings
from zerofl.flower.arguments import is_number, is_one_of
from zerofl.flower.messages import read_payload
from zerofl.flower.packed_model import packed

_log = logging.getLogger("flwr")  # Flower's own, which shows its lines wherever the app runs


class _Sent(NamedTuple):
    """The record that the other strategy sends to some nodes, the one they get, and the model in it if rounded."""

    arrays: ArrayRecord
    given: ArrayRecord
    rounded: State | None


class _Model(NamedTuple):
    """The model that the other strategy sent to some nodes, it as they received it, and what rounding took off it."""

    own: State
    received: Received
    taken_off: State


class SparseUplink(Strategy):
    """A strategy around another: it decodes what `uplink_mod` sent, and gives the whole models to the other one.

    The other may be any that aggregates models: Flower's own, one of yours, or Flower's differential privacy around
    one of these (put SparseUplink outermost). Afterwards `uplink_bytes` has the bytes that came up in each round, and
    `downlink_bytes` those of the models that went down, to train and to evaluate; Flower's log also shows them, beside
    those of whole models.
    The other may send nodes different models, one message to each. A reply that is no well-formed update, or from a
    node that was not asked, is left out, with a warning that names the node and the cause. Integer arrays, which
    averaging makes floats, are rounded back.

    Args:
        strategy: the other.
        downlink_values: the model goes down packed, with its values as one of `zerofl.exchange.wire.VALUES`; None is as
            Flower's arrays. With float32 that is lossless, and saves where the model has zeros, as under
            top_k_weights. Otherwise clients train and evaluate the rounded model, and the strategy keeps its own: what
            clients changed is put onto that (docs/method.md, "A rounded model down"). Every client needs `uplink_mod`
            of zerofl 0.3 or later, first among its app's mods.
        clip_norm: to which the norm of an update's change is clipped before it becomes a whole model; 0 is not at all.
        clip_median: the same for each array, as a multiple of the median of the round's norms. The log names who was
            clipped. See `zerofl.exchange.robust.clipped`; for a trimmed mean let the other be Flower's FedTrimmedAvg.

    Raises:
        TypeError: no strategy of `flwr.serverapp.strategy`, such as an old one of `flwr.server.strategy`.
        ValueError: a SparseUplink, unknown values, or a clipping bound that is none; in a round, with downlink_values,
            a model that cannot be packed: arrays other than float32 and int64, numbers that are not finite, or nearly
            all of them alike.
    """

    def __init__(
        self,
        strategy: Strategy,
        *,
        downlink_values: str | None = None,
        clip_norm: float = 0.0,
        clip_median: float = 0.0,
    ) -> None:
        if not isinstance(strategy, Strategy):
            raise TypeError(_no_strategy(strategy))
        if isinstance(strategy, SparseUplink):
            raise ValueError("SparseUplink around SparseUplink: the inner one would find no updates; use it once")
        if downlink_values is not None and not is_one_of(downlink_values, VALUES):
            raise ValueError(f"downlink_values = {downlink_values!r}: expected None or of {[*VALUES]}")
        for name, value in (("clip_norm", clip_norm), ("clip_median", clip_median)):
            if not (is_number(value) and 0 <= value <= sys.float_info.max):
                raise ValueError(f"{name} = {value!r}: expected 0 or a positive number")
        self.strategy = strategy
        self._downlink_values, self._clip_norm, self._clip_median = downlink_values, clip_norm, clip_median
        self.uplink_bytes: dict[int, int] = {}
        self.downlink_bytes: dict[int, int] = {}
        self._received: State = {}
        self._schema = Schema(())
        self._sent: dict[int, _Sent] = {}

    def summary(self) -> None:
        """Log the other strategy's configuration."""
        self.strategy.summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """What the other sends, packed if asked for; the models are kept to decode the replies with."""
        self._received = arrays.to_torch_state_dict()
        self._schema = schema_of(self._received)
        messages = list(self.strategy.configure_train(server_round, arrays, config, grid))
        self.downlink_bytes[server_round] = 0
        self._sent = self._down(server_round, messages)
        return messages

    def _down(self, server_round: int, messages: list[Message]) -> dict[int, _Sent]:
        """Pack the models in messages if asked for, and count them; what each node gets."""
        sent: dict[int, _Sent] = {}
        given: dict[int, _Sent] = {}  # by their record's identity, which is one for all nodes unless the other has many
        models = size = whole = 0
        for message in messages:
            records = {}
            for key, record in message.content.array_records.items():  # one, or the client refuses
                if id(record) not in given:
                    given[id(record)] = self._as_given(server_round, record)
                sent[message.metadata.dst_node_id] = given[id(record)]
                records[key] = given[id(record)].given
                models, size, whole = models + 1, size + _size(records[key]), whole + _size(record)
            if self._downlink_values is not None:
                message.content = RecordDict({**message.content, **records})  # messages share what the other made
        self.downlink_bytes[server_round] = self.downlink_bytes.get(server_round, 0) + size
        if self._downlink_values is not None and size:
            _log.info(
                "round %d: %d models went down in %.2f MB; as arrays they are %.2f MB, %.1f times as much",
                server_round, models, size / 1e6, whole / 1e6, whole / size,
            )  # fmt: skip
        return sent

    def _as_given(self, server_round: int, arrays: ArrayRecord) -> _Sent:
        if self._downlink_values is None:
            return _Sent(arrays, arrays, None)
        try:
            given, came = packed(arrays, self._downlink_values)
        except ValueError as error:
            raise ValueError(f"round {server_round}: the model cannot be sent packed: {error}") from error
        return _Sent(arrays, given, None if self._downlink_values == "float32" else came)

    def _model_of(self, sent: _Sent) -> _Model:
        own = sent.arrays.to_torch_state_dict()
        came = own if sent.rounded is None else sent.rounded
        return _Model(own, received_model(came, self._schema), rounding(own, came))

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The other's aggregate of the decoded models."""
        replies, sizes, decoded = list(replies), list[int](), list[Message]()
        models: dict[int, _Model] = {}  # by the identity of what was sent

        def updates() -> Iterator[tuple[Update, tuple[Message, State]]]:
            for reply in replies:
                try:
                    if not reply.has_error():
                        payload = read_payload(reply)
                        sent = self._sent.get(reply.metadata.src_node_id)
                        if sent is None:
                            raise ValueError("it was sent no model in this round")
                        if id(sent) not in models:
                            models[id(sent)] = self._model_of(sent)
                        own, received, taken_off = models[id(sent)]
                        yield put_back(decode(payload, self._schema, received), taken_off), (reply, own)
                        sizes.append(len(payload))  # of the updates that are used, as in a run's records
                    decoded.append(reply)
                except ValueError as error:
                    node = reply.metadata.src_node_id
                    _log.warning("round %d: the update of node %d is left out: %s", server_round, node, error)

        for update, (reply, own), clip in clipped(lambda of: of[1], updates(), self._clip_norm, self._clip_median):
            (key,) = reply.content.array_records
            reply.content[key] = ArrayRecord(whole_model(update, own))
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
        """What the other sends, packed if asked for."""
        messages = list(self.strategy.configure_evaluate(server_round, arrays, config, grid))
        self._down(server_round, messages)
        return messages

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """The other's aggregate."""
        return self.strategy.aggregate_evaluate(server_round, replies)


def _size(record: ArrayRecord) -> int:
    return sum(len(array.data) for array in record.values())


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
