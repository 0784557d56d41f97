"""Payloads written out by hand from docs/wire-format.md."""

import struct

import numpy as np
import torch

from zerofl.exchange.update import Sparse, Update, sparsified
from zerofl.exchange.wire import (
    decode,
    encode,
    schema_of,
)

STATE = {"w": torch.zeros(2, 8), "b": torch.zeros(2), "n": torch.tensor(0)}
SCHEMA = schema_of(STATE)

# Written out by hand from docs/wire-format.md.
HEADER = b"ZFL\x01" + b"\x01" + SCHEMA.digest  # magic and version, kind: changes, schema
B = b"\x00" + b"\x00" + struct.pack("<2f", 0.5, 1.0)  # dense, plain
N = b"\x00" + b"\x00" + struct.pack("<q", 5)  # dense, plain
PLAIN_W = b"\x00" + struct.pack("<2f", 1.5, -2.0)
CSR = b"\x01" + struct.pack("<I", 2) + struct.pack("<2i", 3, 10)
BITMAP = b"\x02" + bytes([0b00010000, 0b00100000])
GOLDEN = {
    "csr": HEADER + CSR + PLAIN_W + B + N,
    "cheapest": HEADER + BITMAP + PLAIN_W + B + N,
}


def dense(update: Update, name: str) -> torch.Tensor:
    tensor = update.tensors[name]
    return tensor.to_dense() if isinstance(tensor, Sparse) else tensor


def one_tensor(x: torch.Tensor, values: str = "float32", positions: str = "cheapest", seed: int = 0) -> bytes:
    update = Update(False, {"x": sparsified(x)})
    generator = np.random.default_rng(seed)
    return encode(update, schema_of({"x": x}), values=values, positions=positions, generator=generator)


def back(payload: bytes, x: torch.Tensor) -> torch.Tensor:
    return dense(decode(payload, schema_of({"x": x})), "x")


def random_weights(numel: int, density: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(numel)
    x = torch.randn(numel, generator=generator)
    return torch.where(torch.rand(numel, generator=generator) < density, x, 0.0)


def changed(payload: bytes, offset: int, replacement: bytes) -> bytes:
    return payload[:offset] + replacement + payload[offset + len(replacement) :]


G, C = GOLDEN["csr"], GOLDEN["cheapest"]
