"""Updates and models as bytes, and their strict reader. docs/wire-format.md specifies every byte."""

from zerofl.exchange.wire.payload import POSITIONS, decode, decode_state, encode, encode_state, positions_size
from zerofl.exchange.wire.reader import WireError
from zerofl.exchange.wire.schema import Schema, TensorSpec, schema_of
from zerofl.exchange.wire.values import VALUES

__all__ = [
    "POSITIONS", "VALUES", "Schema", "TensorSpec", "WireError", "decode", "decode_state", "encode", "encode_state",
    "positions_size", "schema_of",
]  # fmt: skip
