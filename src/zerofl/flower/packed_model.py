"""An adopted app's model on its way down: ZeroFL's payload, beside what a client needs to know to read it."""

import json
import math

import torch
from flwr.app import ArrayRecord

from zerofl.exchange.update import State
from zerofl.exchange.wire import Schema, TensorSpec, decode_state, encode_state, schema_of
from zerofl.flower.messages import bytes_array

# A serialisation type of our own, as that of the updates: a client without the mod fails with these words. It is part
# of the protocol, so it stays as it is.
MODEL_STYPE = "zerofl.model: needs ClientApp(mods=[zerofl.flower.uplink_mod(...), ...]) of zerofl 0.3 or later"
TYPES = {"float32": torch.float32, "int64": torch.int64}
# A few bytes can stand for a large tensor of zeros. A model takes at most so many times the bytes that came, or so many
# bytes, whatever it says of itself; a tensor takes so many besides its numbers.
MOST_TIMES, MOST_BYTES, TENSOR_BYTES = 1000, 64_000_000, 1000


def packed(record: ArrayRecord, values: str) -> tuple[ArrayRecord, State]:
    """A model's arrays as one payload, with its values as `zerofl.exchange.wire.encode_state` has them, and its schema.

    Returns:
        the record, and the model as clients read it.

    Raises:
        ValueError: a model that clients would refuse: arrays other than float32 and int64, numbers that are not finite,
            or so many alike that the bytes might stand for anything.
    """
    state = record.to_torch_state_dict()
    schema = schema_of(state)
    names = {dtype: name for name, dtype in TYPES.items()}
    described = [[name, list(shape), names[dtype]] for name, shape, dtype in schema.tensors]
    text = json.dumps(described, separators=(",", ":")).encode()
    payload = encode_state(state, schema, values)
    sent = ArrayRecord({"schema": bytes_array(text, MODEL_STYPE), "model": bytes_array(payload, MODEL_STYPE)})
    return sent, unpacked(sent)


def is_packed(record: ArrayRecord) -> bool:
    """Whether the record holds such a payload."""
    return any(array.stype == MODEL_STYPE for array in record.values())


def unpacked(record: ArrayRecord) -> State:
    """The model, as the values were sent.

    Raises:
        ValueError: it is malformed, or says that it is much larger than what came.
    """
    if set(record) != {"schema", "model"}:
        raise ValueError(f"the packed model holds {', '.join(record)}; expected schema and model")
    text, payload = record["schema"].data, record["model"].data
    try:
        schema = _schema(json.loads(text))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"the packed model's schema is malformed: {error}") from error
    takes = schema.dense_bytes + TENSOR_BYTES * len(schema.tensors)
    if takes > max(MOST_BYTES, MOST_TIMES * len(payload)):
        raise ValueError(
            f"the packed model would take {takes} bytes, and has {len(payload)}: expected at most {MOST_TIMES} times "
            "as many; without downlink_values the server sends arrays, of any numbers"
        )
    return decode_state(payload, schema)


def _schema(described: object) -> Schema:
    if not isinstance(described, list):
        raise ValueError("expected a list")
    specs: dict[str, TensorSpec] = {}
    for line in described:
        if not isinstance(line, list) or len(line) != 3:
            raise ValueError(f"{line!r:.100} is no list of a name, a shape and a type")
        name, shape, dtype = line
        if not isinstance(name, str) or name in specs or dtype not in TYPES:
            raise ValueError(f"{name!r:.100} of {dtype!r:.100}: expected each name once, and {' or '.join(TYPES)}")
        if not isinstance(shape, list) or len(shape) > 64 or not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError(f"{name!r:.100} has the shape {shape!r:.100}: expected a list of at most 64 sizes")
        if math.prod(size for size in shape if size) >= 2**31:  # beside a 0 too: PyTorch multiplies them
            raise ValueError(f"{name!r:.100} has the shape {shape!r:.100}: at most 2^31 - 1 entries can be sent")
        specs[name] = TensorSpec(name, torch.Size(shape), TYPES[dtype])
    return Schema(tuple(specs.values()))
