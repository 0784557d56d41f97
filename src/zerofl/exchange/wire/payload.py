"""The payload: a header, and for each tensor of the schema where its entries are and what they are."""

import struct
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zerofl.exchange.update import Sparse, State, Update, sparsified
from zerofl.exchange.wire.entropy import decode_bitmap, encode_bitmap
from zerofl.exchange.wire.reader import Reader, WireError
from zerofl.exchange.wire.schema import ITEM_BYTES, Schema, TensorSpec
from zerofl.exchange.wire.values import FLOAT32, PLAIN, VALUES, decode_values, encode_values

MAGIC = b"ZFL\x01"
_HEADER = struct.Struct("<4sB8s")
DENSE, CSR, BITMAP, CODED = range(4)
_NUMPY_DTYPE: dict[torch.dtype, np.dtype[Any]] = {torch.float32: np.dtype("<f4"), torch.int64: np.dtype("<i8")}

POSITIONS = ("cheapest", "csr")
"""How an update's positions can be sent: in the cheapest way, or in the paper's CSR form (§6), for comparison."""


def encode(
    update: Update,
    schema: Schema,
    *,
    values: str = "float32",
    positions: str = "cheapest",
    generator: np.random.Generator | None = None,
) -> bytes:
    """The payload of an update: what is sent, and whose length is the communication figure.

    Args:
        update: a tensor for each of the schema's.
        schema: the model's.
        values: one of `VALUES`. float32 is lossless; the others apply to float32 tensors of two or more dimensions.
        positions: one of `POSITIONS`. With "csr" values are plain, as in §6.
        generator: what int8 rounds with.

    Raises:
        ValueError: unknown `values` or `positions`, or a tensor that is missing, of another shape or type than the
            schema's, or holds a non-finite value.
    """
    if values not in VALUES or positions not in POSITIONS:
        raise ValueError(f"values = {values!r} and positions = {positions!r}: expected of {[*VALUES]} and {POSITIONS}")
    parts: list[bytes] = [_HEADER.pack(MAGIC, update.adds, schema.digest)]
    encoded: dict[int, list[bytes]] = {}  # one tensor of two names (tied weights) comes out the same, int8's too
    for name, shape, dtype in schema.tensors:
        tensor = update.tensors.get(name)
        if tensor is None:
            raise ValueError(f"the update has no tensor {name!r}, which the schema names")
        sent_dtype = tensor.values.dtype if isinstance(tensor, Sparse) else tensor.dtype
        if tensor.shape != shape or sent_dtype != dtype:
            raise ValueError(
                f"tensor {name!r} is {sent_dtype} {tuple(tensor.shape)}, the schema says {dtype} {tuple(shape)}"
            )
        if id(tensor) not in encoded:
            kind = PLAIN if positions == "csr" else VALUES[values] if len(shape) > 1 else FLOAT32
            if isinstance(tensor, Sparse) and tensor.values.numel() < shape.numel():
                mask = _encode_mask(tensor, positions)
                entries = tensor.values
            else:
                mask = bytes([DENSE])
                entries = tensor.values if isinstance(tensor, Sparse) else tensor.detach().flatten()
            array = entries.numpy().astype(_NUMPY_DTYPE[dtype], copy=False)
            if not np.isfinite(array).all():
                raise ValueError(f"tensor {name!r} holds non-finite values (NaN or infinity): training has diverged")
            encoded[id(tensor)] = [mask, *encode_values(array, kind, generator)]
        parts += encoded[id(tensor)]
    return b"".join(parts)


def decode(payload: bytes, schema: Schema) -> Update:
    """The update in a payload, checked against the model's schema; its tensors are the caller's own.

    The schema alone decides how much is allocated: a tensor's values and a byte for each of its entries.

    Raises:
        WireError: anything but a well-formed update of this schema with finite values.
    """
    reader = Reader(payload)
    magic, kind, digest = _HEADER.unpack(reader.take(_HEADER.size))
    if magic != MAGIC:
        raise WireError(f"the payload starts with {magic!r}, expected {MAGIC!r} (a ZeroFL payload, version 1)")
    if kind > 1:
        raise WireError(f"kind {kind} in the header, expected 0 (weights) or 1 (changes)")
    if digest != schema.digest:
        raise WireError(f"the update is for schema {digest.hex()}, this model's is {schema.digest.hex()}")
    tensors = {spec.name: _decode_tensor(reader, spec) for spec in schema.tensors}
    if reader.left:
        raise WireError(f"{reader.left} bytes follow the last tensor, expected none")
    return Update(bool(kind), tensors)


def encode_state(state: State, schema: Schema) -> bytes:
    """The payload of a whole model, as the server broadcasts it: lossless, to the bit.

    A tensor is sent sparse where the positions cost less than the zeros they leave out.
    """
    tensors: dict[str, Tensor | Sparse] = {}
    for name, tensor in state.items():
        tensors[name] = tensor
        if tensor.is_floating_point() and (tensor == 0).any():
            sparse = sparsified(tensor)
            zeros = tensor.numel() - sparse.values.numel()  # +0 only
            if positions_size(sparse) < ITEM_BYTES[tensor.dtype] * zeros:
                tensors[name] = sparse
    return encode(Update(False, tensors), schema)


def decode_state(payload: bytes, schema: Schema) -> State:
    """The whole model in a payload; raises WireError as `decode` does."""
    update = decode(payload, schema)
    if update.adds:
        raise WireError("the payload holds changes, expected a model's weights")
    return {
        name: tensor.to_dense() if isinstance(tensor, Sparse) else tensor for name, tensor in update.tensors.items()
    }


def positions_size(sparse: Sparse, positions: str = "cheapest") -> int:
    """The bytes that a sparse tensor's positions take on the wire."""
    return len(_encode_mask(sparse, positions))


def _encode_mask(sparse: Sparse, positions: str) -> bytes:
    """Which entries are sent -> `uint8 encoding` and the cheapest there is."""
    count, numel = sparse.values.numel(), sparse.shape.numel()
    csr_size = 5 + 4 * count
    candidates: list[bytes] = []
    if positions == "cheapest":
        bitmap = sparse.bits.numpy()
        candidates.append(bytes([BITMAP]) + bitmap.tobytes())
        if 0 < count < numel:
            coded = encode_bitmap(bitmap, count, numel)
            candidates.append(struct.pack("<BI", CODED, count) + coded)
    shortest = min(candidates, key=len, default=None)
    if shortest is not None and len(shortest) <= csr_size:
        return shortest
    return struct.pack("<BI", CSR, count) + np.flatnonzero(sparse.mask()).astype("<i4").tobytes()


def _decode_tensor(reader: Reader, spec: TensorSpec) -> Tensor | Sparse:
    name, shape, dtype = spec
    reader.what = f"tensor {name!r}"
    numel = shape.numel()
    encoding = reader.byte()
    if encoding == DENSE:
        return torch.from_numpy(decode_values(reader, numel, _NUMPY_DTYPE[dtype])).view(shape)
    if encoding > CODED or dtype != torch.float32:
        raise reader.refuse(f"has encoding {encoding}, expected 0 (dense) or, for float32, 1 to 3")
    bitmap = _decode_mask(reader, encoding, numel)
    count = int(np.bitwise_count(bitmap).sum())
    values = torch.from_numpy(decode_values(reader, count, _NUMPY_DTYPE[dtype]))
    return Sparse(torch.from_numpy(bitmap), values, shape)


def _decode_mask(reader: Reader, encoding: int, numel: int) -> np.ndarray:
    """The positions as a bitmap, uint8 [ceil(numel / 8)], of its own."""
    if encoding == CSR:
        count = reader.uint32()
        if count > numel:
            raise reader.refuse(f"claims {count} entries, it has only {numel}")
        positions = reader.array("<i4", count)
        if count and (positions[0] < 0 or positions[-1] >= numel):
            raise reader.refuse(f"has positions {positions[0]} to {positions[-1]}, expected 0 to {numel - 1}")
        if not (positions[1:] > positions[:-1]).all():
            raise reader.refuse("has positions that do not rise strictly")
        mask = np.zeros(numel, bool)
        mask[positions] = True
        return np.packbits(mask)
    if encoding == BITMAP:
        bitmap = reader.array("u1", -(-numel // 8)).copy()
    else:
        count = reader.uint32()
        if not 0 < count < numel:
            raise reader.refuse(f"claims {count} entries, expected 1 to {numel - 1} of its {numel}")
        bitmap = decode_bitmap(reader, count, numel)
        if np.bitwise_count(bitmap).sum() != count:
            raise reader.refuse(f"claims {count} entries, its positions are {np.bitwise_count(bitmap).sum()}")
    if numel % 8 and bitmap[-1] & (0xFF >> numel % 8):
        raise reader.refuse(f"has positions beyond its {numel} entries")
    return bitmap
