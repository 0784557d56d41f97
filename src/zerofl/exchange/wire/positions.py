"""Where a tensor's sent entries are, in the shortest of several encodings."""

import math
import struct

import numpy as np

from zerofl.exchange.update import Sparse
from zerofl.exchange.wire.entropy import decode_bitmaps, encode_bitmaps
from zerofl.exchange.wire.reader import Reader
from zerofl.exchange.wire.received import ReceivedTensor, deal_bits, gather_bits

DENSE, CSR, BITMAP, CODED, BY_CLASS = range(5)

POSITIONS = ("cheapest", "csr")
"""How an update's positions can be sent: in the cheapest way, or in the paper's CSR form (§6), for comparison."""


def positions_size(sparse: Sparse, positions: str = "cheapest", received: ReceivedTensor | None = None) -> int:
    """The bytes that a sparse tensor's positions take on the wire, by what was `received` if that is given."""
    return len(encode_positions(sparse, positions, received))


def encode_positions(sparse: Sparse, positions: str, received: ReceivedTensor | None) -> bytes:
    """Which entries are sent -> `uint8 encoding` and the cheapest there is, by what was received if that is given."""
    count, numel = sparse.values.numel(), sparse.shape.numel()
    csr_size = 5 + 4 * count
    shortest = None
    if positions == "cheapest":
        bitmap = sparse.bits.numpy()
        shortest = bytes([BITMAP]) + bitmap.tobytes()
        by_class = None if received is None else bytes([BY_CLASS]) + _encode_by_class(bitmap, received)
        if 0 < count < numel and (by_class is None or _least_bytes(count, numel) < len(by_class)):
            coded = encode_bitmaps(bitmap, np.array([count]), np.array([numel]))
            shortest = min(shortest, struct.pack("<BI", CODED, count) + coded, key=len)
        if by_class is not None:
            shortest = min(shortest, by_class, key=len)
    if shortest is not None and len(shortest) <= csr_size:
        return shortest
    return struct.pack("<BI", CSR, count) + np.flatnonzero(sparse.mask()).astype("<i4").tobytes()


def _least_bytes(count: int, numel: int) -> float:
    """Below this the coded bitmap cannot be, which need not be made to know it: a little under its entropy."""
    p = count / numel
    return -0.98 * numel * (p * math.log2(p) + (1 - p) * math.log2(1 - p)) / 8


def _encode_by_class(bitmap: np.ndarray, received: ReceivedTensor) -> bytes:
    """Each class's count, in as many bytes as its size has, and the bitmaps of those that are neither 0 nor all."""
    sizes = received.sizes
    dealt = np.split(deal_bits(received.entries.classes, sizes, bitmap), np.cumsum(-(-sizes // 8))[:-1])
    counts = np.array([np.bitwise_count(of_class).sum() for of_class in dealt], np.int64)
    coded = (counts > 0) & (counts < sizes)
    bitmaps = np.concatenate([np.empty(0, np.uint8), *(dealt[number] for number in np.flatnonzero(coded))])
    written = [int(count).to_bytes(_width(size), "little") for count, size in zip(counts, sizes, strict=True)]
    return b"".join([*written, encode_bitmaps(bitmaps, counts[coded], sizes[coded])])


def _width(size: int) -> int:
    """The bytes that a number up to `size` takes."""
    return -(-int(size).bit_length() // 8)


def _decode_by_class(reader: Reader, received: ReceivedTensor) -> np.ndarray:
    """The bitmap that `_encode_by_class` wrote."""
    sizes = received.sizes
    counts = np.array([int.from_bytes(reader.take(_width(size)), "little") for size in sizes], np.int64)
    if (counts > sizes).any():
        number = int((counts > sizes).argmax())
        raise reader.refuse(f"claims {counts[number]} entries of class {number}, which has only {sizes[number]}")
    coded = (counts > 0) & (counts < sizes)
    bitmaps = decode_bitmaps(reader, counts[coded], sizes[coded])
    dealt, begin = [], 0
    for number, size in enumerate(sizes):
        width = -(-int(size) // 8)
        if not coded[number]:
            dealt.append(np.packbits(np.full(size, counts[number] > 0)))
            continue
        bitmap = bitmaps[begin : begin + width]
        begin += width
        if (found := np.bitwise_count(bitmap).sum()) != counts[number]:
            raise reader.refuse(f"claims {counts[number]} entries of class {number}, its positions are {found}")
        if size % 8 and bitmap[-1] & (0xFF >> size % 8):
            raise reader.refuse(f"has positions beyond the {size} entries of class {number}")
        dealt.append(bitmap)
    return gather_bits(received.entries.classes, sizes, np.concatenate(dealt))


def decode_positions(reader: Reader, encoding: int, numel: int, received: ReceivedTensor | None) -> np.ndarray:
    """The positions of an encoding above 0, as a bitmap, uint8 [ceil(numel / 8)], of its own."""
    if encoding == BY_CLASS:
        if received is None:
            raise reader.refuse("has encoding 4, by a received tensor, and there is none that it could refer to")
        return _decode_by_class(reader, received)
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
        bitmap = decode_bitmaps(reader, np.array([count]), np.array([numel]))
        if np.bitwise_count(bitmap).sum() != count:
            raise reader.refuse(f"claims {count} entries, its positions are {np.bitwise_count(bitmap).sum()}")
    if numel % 8 and bitmap[-1] & (0xFF >> numel % 8):
        raise reader.refuse(f"has positions beyond its {numel} entries")
    return bitmap
