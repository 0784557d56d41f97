"""Updates and models as bytes, and their strict reader. docs/wire-format.md specifies every byte."""

from zerofl.exchange.wire.payload import decode, decode_state, encode, encode_state
from zerofl.exchange.wire.positions import POSITIONS, positions_size
from zerofl.exchange.wire.reader import WireError
from zerofl.exchange.wire.received import Received, received_model
from zerofl.exchange.wire.schema import Schema, TensorSpec, schema_of
from zerofl.exchange.wire.values import VALUES

__all__ = [
    "POSITIONS", "VALUES", "Received", "Schema", "TensorSpec", "WireError", "decode", "decode_state", "encode",
    "encode_state", "positions_size", "received_model", "schema_of",
]  # fmt: skip
