"""Updates as bytes: the CSR form of §6, one int32 index for each float32 value, and its strict reader.

Version 1, all numbers little-endian. Tensors are positional: the schema both sides derive from the model fixes their
order, names, shapes and types, and its hash stands in the header.

    4 bytes   magic "ZFL" and the version, 1
    1 byte    kind: 0 the tensors are weights, 1 they are changes that the server adds
    8 bytes   the first 8 bytes of the schema's SHA-256
    then, for each tensor of the schema:
    1 byte    encoding: 0 dense, 1 CSR
    dense     the tensor's entries, in row-major order
    CSR       uint32 count; count x int32 positions in the flattened tensor, strictly rising; count x float32 values

A sparse tensor is sent in whichever of the two is shorter, so an update never costs more than the dense model plus the
header. Nothing may follow the last tensor.
"""

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from zerofl.uplink import Sparse, State, Update

MAGIC = b"ZFL\x01"
_HEADER = struct.Struct("<4sB8s")
_COUNT = struct.Struct("<I")
_DENSE, _CSR = 0, 1
_NUMPY_DTYPE: dict[torch.dtype, np.dtype[Any]] = {torch.float32: np.dtype("<f4"), torch.int64: np.dtype("<i8")}


class WireError(ValueError):
    """A payload that is not a well-formed update for the model; the message says what is wrong, and in which tensor."""


class TensorSpec(NamedTuple):
    """One tensor of a schema."""

    name: str
    shape: torch.Size
    dtype: torch.dtype


@dataclass(frozen=True)
class Schema:
    """The names, shapes and types of a model's state, in its own order."""

    tensors: tuple[TensorSpec, ...]

    @property
    def digest(self) -> bytes:
        """The first 8 bytes of the SHA-256 of the tensors' names, shapes and types."""
        lines = [f"{name} {tuple(shape)} {dtype}\n" for name, shape, dtype in self.tensors]
        return hashlib.sha256("".join(lines).encode()).digest()[:8]

    @property
    def dense_bytes(self) -> int:
        """The length of an update that sends every tensor whole, headers included."""
        sizes = [shape.numel() * _NUMPY_DTYPE[dtype].itemsize for _, shape, dtype in self.tensors]
        return _HEADER.size + len(sizes) + sum(sizes)


def schema_of(state: Mapping[str, Tensor]) -> Schema:
    """The schema of a state_dict.

    Raises:
        ValueError: a tensor that is neither float32 nor int64.
    """
    for name, tensor in state.items():
        if tensor.dtype not in _NUMPY_DTYPE:
            raise ValueError(
                f"tensor {name!r} is {tensor.dtype}: only float32 and int64 can be sent; convert it before sending, "
                "for example with model.float()"
            )
    return Schema(tuple(TensorSpec(name, tensor.shape, tensor.dtype) for name, tensor in state.items()))


def encode(update: Update, schema: Schema) -> bytes:
    """The payload of an update: what is sent, and whose length is the communication figure."""
    parts: list[bytes] = [_HEADER.pack(MAGIC, update.adds, schema.digest)]
    for name, shape, dtype in schema.tensors:
        tensor = update.tensors[name]
        if tensor.shape != shape:
            raise ValueError(f"tensor {name!r} has shape {tuple(tensor.shape)}, the schema says {tuple(shape)}")
        if isinstance(tensor, Sparse):
            count = tensor.positions.numel()
            if _COUNT.size + 8 * count < 4 * shape.numel():
                positions = tensor.positions.numpy().astype("<i4").tobytes()
                values = tensor.values.numpy().astype("<f4", copy=False).tobytes()
                parts += [bytes([_CSR]), _COUNT.pack(count), positions, values]
                continue
            tensor = tensor.to_dense()
        entries = tensor.detach().numpy().astype(_NUMPY_DTYPE[dtype], copy=False)
        parts += [bytes([_DENSE]), entries.tobytes()]
    return b"".join(parts)


def decode(payload: bytes, schema: Schema) -> Update:
    """The update in a payload, checked against the model's schema; its tensors are the caller's own.

    Nothing is allocated before the payload was seen to hold it.

    Raises:
        WireError: anything but a well-formed update of this schema with finite values.
    """
    reader = _Reader(payload)
    magic, kind, digest = _HEADER.unpack(reader.take(_HEADER.size, "the header"))
    if magic != MAGIC:
        raise WireError(f"the payload starts with {magic!r}, expected {MAGIC!r} (a ZeroFL update, version 1)")
    if kind > 1:
        raise WireError(f"kind {kind} in the header, expected 0 (weights) or 1 (changes)")
    if digest != schema.digest:
        raise WireError(f"the update is for schema {digest.hex()}, this model's is {schema.digest.hex()}")
    tensors = {spec.name: _read_tensor(reader, spec) for spec in schema.tensors}
    if reader.left:
        raise WireError(f"{reader.left} bytes follow the last tensor, expected none")
    return Update(bool(kind), tensors)


def encode_state(state: State, schema: Schema) -> bytes:
    """The payload of a whole model, as the server broadcasts it."""
    return encode(Update(False, dict(state)), schema)


def decode_state(payload: bytes, schema: Schema) -> State:
    """The whole model in a payload; raises WireError as `decode` does."""
    update = decode(payload, schema)
    if update.adds:
        raise WireError("the payload holds changes, expected a model's weights")
    return {
        name: tensor.to_dense() if isinstance(tensor, Sparse) else tensor for name, tensor in update.tensors.items()
    }


class _Reader:
    """Takes a payload apart from front to back, never past its end."""

    def __init__(self, payload: bytes) -> None:
        self._view = memoryview(payload)

    @property
    def left(self) -> int:
        return len(self._view)

    def take(self, size: int, what: str) -> memoryview:
        if size > self.left:
            raise WireError(f"the payload ends within {what}: {size} bytes expected, {self.left} left")
        taken, self._view = self._view[:size], self._view[size:]
        return taken


def _read_tensor(reader: _Reader, spec: TensorSpec) -> Tensor | Sparse:
    name, shape, dtype = spec
    what = f"tensor {name!r}"
    encoding = reader.take(1, what)[0]
    if encoding == _DENSE:
        numpy_dtype = _NUMPY_DTYPE[dtype]
        entries = np.frombuffer(reader.take(shape.numel() * numpy_dtype.itemsize, what), numpy_dtype)
        _check_finite(entries, what)
        return torch.from_numpy(entries.copy()).view(shape)
    if encoding != _CSR or dtype != torch.float32:
        raise WireError(f"{what} has encoding {encoding}, expected 0 (dense) or, for float32, 1 (CSR)")
    (count,) = _COUNT.unpack(reader.take(_COUNT.size, what))
    if count > shape.numel():
        raise WireError(f"{what} claims {count} entries, it has only {shape.numel()}")
    positions = np.frombuffer(reader.take(4 * count, what), "<i4")
    values = np.frombuffer(reader.take(4 * count, what), "<f4")
    if count and (positions[0] < 0 or positions[-1] >= shape.numel()):
        raise WireError(f"{what} has positions {positions[0]} to {positions[-1]}, expected 0 to {shape.numel() - 1}")
    if not (positions[1:] > positions[:-1]).all():
        raise WireError(f"{what} has positions that do not rise strictly")
    _check_finite(values, what)
    return Sparse(torch.from_numpy(positions.astype(np.int64)), torch.from_numpy(values.copy()), shape)


def _check_finite(entries: np.ndarray, what: str) -> None:
    if not np.isfinite(entries).all():
        raise WireError(f"{what} holds {np.count_nonzero(~np.isfinite(entries))} non-finite values (NaN or infinity)")
