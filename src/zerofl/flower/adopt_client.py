"""ZeroFL's uplink in somebody else's Flower app, on the client: a mod.

    app = ClientApp(mods=[uplink_mod(sparsity=0.9, mask_ratio=0.2)])         # with zerofl.sparsify_(model, 0.9) in it

What the app trained comes up as ZeroFL's payload; the app's model comes down as Flower sends it, or packed, if the
server says so (`zerofl.flower.adopt_server`).
"""

from collections.abc import Callable, Iterable, Mapping
from numbers import Integral

import torch
from flwr.app import ArrayRecord, Context, Message, MessageType, RecordDict

from zerofl.exchange.update import State
from zerofl.exchange.uplink import UPLINKS, make_update, tied
from zerofl.exchange.wire import VALUES, encode, received_model, schema_of
from zerofl.exchange.wrappers import differing_names, wrapper_hint
from zerofl.flower.arguments import is_number, is_one_of
from zerofl.flower.messages import PAYLOAD_STYPE, payload_record
from zerofl.flower.packed_model import is_packed, unpacked
from zerofl.rng import rng
from zerofl.sparse.default_layers import default_by_shape
from zerofl.sparse.distribution import DISTRIBUTIONS

CallNext = Callable[[Message, Context], Message]
Mod = Callable[[Message, Context, CallNext], Message]

# With this key in the configuration Flower's mods clip on the client, for differential privacy.
CLIPPING_NORM = "clipping_norm"


def uplink_mod(
    uplink: str = "top_k_weights_diff",
    *,
    sparsity: float,
    mask_ratio: float = 0.0,
    distribution: str = "uniform",
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
        distribution: that of `sparsify_`.
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
        ValueError: an unknown uplink, distribution or values, a fraction or seed that is none or out of range, or
            layers that are no list of names. A message that does not fit makes the client answer with an error: not
            exactly one ArrayRecord, arrays other than float32 and int64, a layer that is not there or no weight, no
            array to send a part of, a trained model with other names, tied weights that came with different values, or
            an uplink that would break a client-side clipping bound.
    """
    if not is_one_of(uplink, UPLINKS) or not is_one_of(values, VALUES):
        raise ValueError(f"uplink = {uplink!r}, values = {values!r}: expected of {[*UPLINKS]} and {[*VALUES]}")
    if not is_one_of(distribution, DISTRIBUTIONS):
        raise ValueError(f"distribution = {distribution!r}: expected of {[*DISTRIBUTIONS]}")
    if not (is_number(sparsity) and 0 <= sparsity < 1 and is_number(mask_ratio) and 0 <= mask_ratio <= 1):
        raise ValueError(
            f"sparsity = {sparsity!r}, mask_ratio = {mask_ratio!r}: expected fractions in [0, 1) and [0, 1]"
        )
    if not isinstance(seed, Integral) or seed < 0:
        raise ValueError(f"seed = {seed!r}: expected a whole number, 0 or more")
    named = None if layers is None else _list_of_names(layers)

    def mod(message: Message, context: Context, call_next: CallNext) -> Message:
        _unpack(message)
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
        record = ArrayRecord(dict(record))  # the app may empty its own, as with to_torch_state_dict(keep_input=False)
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
        update = make_update(uplink, received, trained, sparse, sparsity, mask_ratio, distribution)
        came, generator = received_model(received, schema), rng(seed, _round(message), context.node_id, "int8")
        reply.content[key] = payload_record(encode(update, schema, values=values, received=came, generator=generator))
        return reply

    return mod


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


def _unpack(message: Message) -> None:
    """Put the model that the server packed into the message, as the app expects it."""
    records = message.content.array_records
    if any(is_packed(record) for record in records.values()):
        models = {key: ArrayRecord(unpacked(record)) for key, record in records.items() if is_packed(record)}
        message.content = RecordDict({**message.content, **models})  # of its own: messages share one with each other


def _only_arrays(message: Message) -> tuple[str, ArrayRecord]:
    records = list(message.content.array_records.items())
    if len(records) != 1:
        raise ValueError(f"a message for the uplink holds {len(records)} ArrayRecords, expected one with the model")
    return records[0]


def _round(message: Message) -> int:
    """The round that Flower's strategies put into the configuration; 0 without it."""
    rounds = [config["server-round"] for config in message.content.config_records.values() if "server-round" in config]
    return rounds[0] if rounds and isinstance(rounds[0], int) else 0
