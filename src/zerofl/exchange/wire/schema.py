"""What both sides know of a model before anything is sent: names, shapes and types, in order."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

ITEM_BYTES = {torch.float32: 4, torch.int64: 8}


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
        """The first 8 bytes of the SHA-256 of a line `name (shape) dtype` for each tensor."""
        lines = [f"{name} {tuple(shape)} {dtype}\n" for name, shape, dtype in self.tensors]
        return hashlib.sha256("".join(lines).encode()).digest()[:8]

    @property
    def dense_bytes(self) -> int:
        """The bytes of the model's numbers themselves: what sending it whole and unencoded takes."""
        return sum(shape.numel() * ITEM_BYTES[dtype] for _, shape, dtype in self.tensors)


def schema_of(state: Mapping[str, Tensor]) -> Schema:
    """The schema of a state_dict.

    Raises:
        ValueError: a tensor that is neither float32 nor int64, or too large for 32-bit positions.
    """
    for name, tensor in state.items():
        if tensor.dtype not in ITEM_BYTES:
            raise ValueError(f"tensor {name!r} is {tensor.dtype}: only float32 and int64 can be sent; {_fix(tensor)}")
        if tensor.numel() >= 2**31:
            raise ValueError(f"tensor {name!r} has {tensor.numel()} entries: at most 2^31 - 1 can be sent")
    return Schema(tuple(TensorSpec(name, tensor.shape, tensor.dtype) for name, tensor in state.items()))


def _fix(tensor: Tensor) -> str:
    """What to do with a tensor of another type: model.float() changes the floating-point ones alone."""
    if tensor.is_floating_point():
        return "model.float() makes it float32"
    if tensor.is_complex():
        return "keep its real and imaginary parts as float32, with torch.view_as_real"
    return (
        "keep it as int64, tensor.long(), which is averaged and rounded (model.float() leaves it as it is), or, if it "
        "need not travel, out of the state_dict, with register_buffer(..., persistent=False)"
    )
