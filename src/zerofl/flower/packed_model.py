"""An adopted app's model on its way down: ZeroFL's payload, beside what a client needs to know to read it."""

import json
import math

import torch
from flwr.app import Array, ArrayRecord

from zerofl.exchange.update import State
from zerofl.exchange.wire import Schema, TensorSpec, decode_state, encode_state, schema_of

# A serialisation type of our own, as that of the updates: a client without the mod fails with these words.
MODEL_STYPE = "zerofl.model: put zerofl.flower.uplink_mod first among the client app's mods"
TYPES = {"float32": torch.float32, "int64": torch.int64}
# A few bytes can stand for a large tensor of zeros. A model has at most so many times the bytes that came, or so many,
# whatever it says of itself.
MOST_TIMES, MOST_BYTES = 1000, 64_000_000


def packed(record: ArrayRecord, values: str) -> ArrayRecord:
    """A model's arrays as one payload, with its values as `zerofl.exchange.wire.encode_state` has them, and its schema.

    Raises:
        ValueError: arrays other than float32 and int64, or numbers that are not finite.
    """
    state = record.to_torch_state_dict()
    schema = schema_of(state)
    names = {dtype: name for name, dtype in TYPES.items()}
    described = [[name, list(shape), names[dtype]] for name, shape, dtype in schema.tensors]
    text = json.dumps(described, separators=(",", ":")).encode()
    return ArrayRecord({"schema": _array(text), "model": _array(encode_state(state, schema, values))})


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
    if schema.dense_bytes > max(MOST_BYTES, MOST_TIMES * len(payload)):
        raise ValueError(
            f"the packed model says that it has {schema.dense_bytes} bytes, and came in {len(payload)}: expected at "
            f"most {MOST_TIMES} times as many"
        )
    return decode_state(payload, schema)


def _schema(described: object) -> Schema:
    if not isinstance(described, list):
        raise ValueError("expected a list")
    specs: dict[str, TensorSpec] = {}
    for name, shape, dtype in described:
        if not isinstance(name, str) or name in specs or dtype not in TYPES:
            raise ValueError(f"{name!r} of {dtype!r}: expected each name once, and {' or '.join(TYPES)}")
        if not all(isinstance(size, int) and 0 <= size < 2**31 for size in shape) or len(shape) > 64:
            raise ValueError(f"{name!r} has the shape {shape!r}: expected sizes from 0 to 2^31 - 1")
        if math.prod(shape) >= 2**31:
            raise ValueError(f"{name!r} has the shape {shape!r}: at most 2^31 - 1 entries can be sent")
        specs[name] = TensorSpec(name, torch.Size(shape), TYPES[dtype])
    return Schema(tuple(specs.values()))


def _array(data: bytes) -> Array:
    return Array(dtype="uint8", shape=(len(data),), stype=MODEL_STYPE, data=data)
