"""The payload: a header, and for each tensor of the schema where its entries are and what they are."""

import struct
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from zerofl.exchange.update import Sparse, State, Update, sparsified
from zerofl.exchange.wire.positions import (
    BY_CLASS,
    DENSE,
    POSITIONS,
    decode_positions,
    encode_positions,
    positions_size,
)
from zerofl.exchange.wire.reader import Reader, WireError
from zerofl.exchange.wire.received import Received, ReceivedTensor
from zerofl.exchange.wire.schema import Schema, TensorSpec
from zerofl.exchange.wire.values import (
    DIFFERENCES,
    FLOAT32,
    INT8,
    PLAIN,
    VALUES,
    WIDTHS,
    decode_values,
    encode_values,
    int8_scale,
)

MAGIC = b"ZFL\x01"
_HEADER = struct.Struct("<4sB8s")
_ADDS, _REFERS = 1, 2  # bits of the header's kind
_NUMPY_DTYPE: dict[torch.dtype, np.dtype[Any]] = {torch.float32: np.dtype("<f4"), torch.int64: np.dtype("<i8")}


def encode(
    update: Update,
    schema: Schema,
    *,
    values: str = "float32",
    positions: str = "cheapest",
    received: Received | None = None,
    generator: np.random.Generator | None = None,
) -> bytes:
    """The payload of an update: what is sent, and whose length is the communication figure.

    Args:
        update: a tensor for each of the schema's.
        schema: the model's.
        values: one of `VALUES`. float32 is lossless; the others apply to float32 tensors of two or more dimensions.
        positions: one of `POSITIONS`. With "csr" values are plain, as in §6.
        received: the model that the client received (`received_model`): what it tells of the update need not be sent.
            Then `decode` needs it too.
        generator: what int8 rounds with, at random and without bias; without it int8 rounds to nearest.

    Raises:
        ValueError: unknown `values` or `positions`, or a tensor that is missing,
            of another shape or type than the schema's, or holds a non-finite value.
    """
    _expect_known(values, positions)
    known = received.tensors if received is not None and positions == "cheapest" else {}
    parts: list[bytes] = []
    refers = False
    encoded: dict[int, _Encoded] = {}  # one tensor of two names (tied weights) comes out the same, int8's too
    for name, shape, dtype in schema.tensors:
        tensor = update.tensors.get(name)
        if tensor is None:
            raise ValueError(f"the update has no tensor {name!r}, which the schema names")
        sent_dtype = tensor.values.dtype if isinstance(tensor, Sparse) else tensor.dtype
        if tensor.shape != shape or sent_dtype != dtype:
            raise ValueError(
                f"tensor {name!r} is {sent_dtype} {tuple(tensor.shape)}, the schema says {dtype} {tuple(shape)}"
            )
        before, done = known.get(name), encoded.get(id(tensor))
        if done is None or not _is_same(before, done.before):
            kind = PLAIN if positions == "csr" else _kind_of(shape, values)
            done = encoded[id(tensor)] = _encode_tensor(tensor, name, kind, positions, before, update.adds, generator)
        parts += done.parts
        refers = refers or done.refers
    head = _HEADER.pack(MAGIC, update.adds * _ADDS | refers * _REFERS, schema.digest)
    reference = struct.pack("<I", received.checksum) if received is not None and refers else b""
    return b"".join([head, reference, *parts])


def _expect_known(values: str, positions: str = "cheapest") -> None:
    if values not in VALUES or positions not in POSITIONS:
        raise ValueError(f"values = {values!r} and positions = {positions!r}: expected of {[*VALUES]} and {POSITIONS}")


def _kind_of(shape: torch.Size, values: str) -> int:
    """What kind of values a float32 tensor of this shape is sent as, if these are asked for."""
    return VALUES[values] if len(shape) > 1 else FLOAT32


class _Encoded(NamedTuple):
    """A tensor's bytes, the received one that it was encoded with, and whether it refers to that."""

    parts: list[bytes]
    before: ReceivedTensor | None
    refers: bool


def _is_same(one: ReceivedTensor | None, other: ReceivedTensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return np.array_equal(one.entries.numbers, other.entries.numbers)


def _encode_tensor(
    tensor: Tensor | Sparse,
    name: str,
    kind: int,
    positions: str,
    before: ReceivedTensor | None,
    adds: bool,
    generator: np.random.Generator | None,
) -> _Encoded:
    received = None if before is None or adds else before.entries
    if isinstance(tensor, Sparse) and tensor.values.numel() < tensor.shape.numel():
        mask = encode_positions(tensor, positions, before)
        entries = tensor.values
        received = None if before is None or adds else before.at(tensor.bits)
    else:
        mask = bytes([DENSE])
        entries = tensor.values if isinstance(tensor, Sparse) else tensor.detach().flatten()
    array = np.ascontiguousarray(entries.numpy(), _NUMPY_DTYPE[entries.dtype])  # a view may have gaps
    if not np.isfinite(array).all():
        raise ValueError(f"tensor {name!r} holds non-finite values (NaN or infinity): training has diverged")
    coded = encode_values(array, kind, generator, received)
    return _Encoded([mask, *coded], before, mask[0] == BY_CLASS or coded[0][0] > DIFFERENCES)


def decode(payload: bytes, schema: Schema, received: Received | None = None) -> Update:
    """The update in a payload, checked against the model's schema; its tensors are the caller's own.

    `received` is the model that the client received (`received_model`): a payload that refers to one needs it.
    The schema alone decides how much is allocated: a tensor's values and a few bytes for each of its entries.

    Raises:
        WireError: anything but a well-formed update of this schema, and of this model, with finite values.
    """
    reader = Reader(payload)
    magic, kind, digest = _HEADER.unpack(reader.take(_HEADER.size))
    if magic != MAGIC:
        raise WireError(f"the payload starts with {magic!r}, expected {MAGIC!r} (a ZeroFL payload, version 1)")
    if kind > _ADDS | _REFERS:
        raise WireError(f"kind {kind} in the header, expected 0 (weights) or 1 (changes), and 2 more if it refers")
    if digest != schema.digest:
        raise WireError(f"the update is for schema {digest.hex()}, this model's is {schema.digest.hex()}")
    known = _referred_to(reader.uint32(), received).tensors if kind & _REFERS else {}
    adds = bool(kind & _ADDS)
    tensors = {spec.name: _decode_tensor(reader, spec, known.get(spec.name), adds) for spec in schema.tensors}
    if reader.left:
        raise WireError(f"{reader.left} bytes follow the last tensor, expected none")
    return Update(adds, tensors)


def _referred_to(checksum: int, received: Received | None) -> Received:
    """The received model that an update refers to by its checksum."""
    if received is None:
        raise WireError("the update refers to the model that the client received; give it: decode(..., received=...)")
    if checksum != received.checksum:
        raise WireError(
            f"the update refers to a received model of checksum {checksum:08x}, the one here has "
            f"{received.checksum:08x}: it answers another round, or the model was changed on its way"
        )
    return received


def encode_state(state: State, schema: Schema, values: str = "float32") -> bytes:
    """The payload of a whole model, as the server broadcasts it: with float32 values lossless, to the bit.

    A tensor is sent sparse where the positions cost less than the zeros they leave out; with int8 what rounds to zero
    is among them. `values` are those of `encode`, rounded to nearest; it has the errors too.
    """
    _expect_known(values)
    tensors: dict[str, Tensor | Sparse] = {}
    for name, tensor in state.items():
        tensors[name] = tensor
        if tensor.is_floating_point() and tensor.numel():
            kind = _kind_of(tensor.shape, values)
            sparse = sparsified(tensor, int8_scale(tensor.abs().max().item()) / 2 if kind == INT8 else 0.0)
            zeros = tensor.numel() - sparse.values.numel()
            if zeros and positions_size(sparse) < WIDTHS[kind] * zeros:
                tensors[name] = sparse
    return encode(Update(False, tensors), schema, values=values)


def decode_state(payload: bytes, schema: Schema) -> State:
    """The whole model in a payload; raises WireError as `decode` does."""
    update = decode(payload, schema)
    if update.adds:
        raise WireError("the payload holds changes, expected a model's weights")
    return {
        name: tensor.to_dense() if isinstance(tensor, Sparse) else tensor for name, tensor in update.tensors.items()
    }


def _decode_tensor(reader: Reader, spec: TensorSpec, before: ReceivedTensor | None, adds: bool) -> Tensor | Sparse:
    """The next tensor of a payload, which may refer to the one that the client received `before`."""
    name, shape, dtype = spec
    reader.what = f"tensor {name!r}"
    encoding = reader.byte()
    if encoding == DENSE:
        received = None if before is None or adds else before.entries
        return torch.from_numpy(decode_values(reader, shape.numel(), _NUMPY_DTYPE[dtype], received)).view(shape)
    if encoding > BY_CLASS or dtype != torch.float32:
        raise reader.refuse(f"has encoding {encoding}, expected 0 (dense) or, for float32, 1 to 4")
    bitmap = decode_positions(reader, encoding, shape.numel(), before)
    bits, count = torch.from_numpy(bitmap), int(np.bitwise_count(bitmap).sum())
    received = None if before is None or adds else before.at(bits)
    return Sparse(bits, torch.from_numpy(decode_values(reader, count, _NUMPY_DTYPE[dtype], received)), shape)
