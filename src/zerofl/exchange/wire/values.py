"""The values of a tensor as bytes: plain, or in byte planes that are compressed where that pays.

A float's bits are rotated by one, so that its exponent fills a whole byte and its sign becomes the lowest bit. Trained
weights, and the largest of them in particular, have few exponents: that plane shrinks to a small part. Of weights that
the client received before it trained them, the differences from those are sent where that is shorter.
"""

import math
import struct
import threading

import numpy as np
import zstandard

from zerofl.exchange.wire import native
from zerofl.exchange.wire.reader import Reader
from zerofl.exchange.wire.received import ReceivedEntries, deal, gather
from zerofl.sparse import dispatch

PLAIN, FLOAT32, FLOAT16, BFLOAT16, INT8 = range(5)
DIFFERENCES = 4  # added to one of the last four: their differences from what was received

VALUES = {"float32": FLOAT32, "float16": FLOAT16, "bfloat16": BFLOAT16, "int8": INT8}
"""The value types of an update by name: float32 is lossless, the others round tensors of two or more dimensions."""

WIDTHS = {FLOAT32: 4, FLOAT16: 2, BFLOAT16: 2, INT8: 1}
"""The bytes of a value of each type, before they are compressed."""

# A plane is compressed only where it shrinks by a twentieth. zstd's first level is mostly its Huffman coder, a few
# nanoseconds a byte; weights have no repetitions that the higher ones could find.
_WORTHWHILE, _LEVEL = 0.95, 1
_LARGEST_COUNT = 2**53  # a double, in which counters are averaged, holds every whole number up to it


class _Zstd(threading.local):
    """A thread's own coders: making them takes longer than coding a small plane."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(level=_LEVEL)
        self.decompressor = zstandard.ZstdDecompressor()


_ZSTD = _Zstd()


def encode_values(
    values: np.ndarray, kind: int, generator: np.random.Generator | None, received: ReceivedEntries | None = None
) -> list[bytes]:
    """Finite float32 [n] or int64 [n] -> `uint8 kind` and what it says, in pieces that nothing has copied together.

    With what was `received` in their place, [n], their differences if those are shorter. int8 rounds at random, by
    `generator`, or without one to nearest.
    """
    if kind == PLAIN or values.dtype != np.float32:
        return [bytes([PLAIN]), values.tobytes()]
    head, numbers, scale = _rounded(values, kind, generator)
    coded = [bytes([kind]), head, *_encode_planes(_split(numbers))]
    if received is not None:
        differences = deal(received.classes, _difference(numbers, _numbers_received(received, kind, scale)))
        against = [bytes([kind + DIFFERENCES]), head, *_encode_planes(_split(differences))]
        coded = min(coded, against, key=_size)
    if kind == FLOAT32 and _size(coded) >= 1 + values.nbytes:
        return [bytes([PLAIN]), values.tobytes()]
    return coded


def _size(parts: list[bytes]) -> int:
    return sum(map(len, parts))


def _rounded(values: np.ndarray, kind: int, generator: np.random.Generator | None) -> tuple[bytes, np.ndarray, float]:
    """Finite float32 [n] as numbers of a kind: what is said before them, their bits [n], and their scale or shift."""
    if kind in (FLOAT32, BFLOAT16):
        return b"", (_bfloat16 if kind == BFLOAT16 else _bits)(values), 0.0
    largest = float(np.abs(values).max(initial=0.0))
    if kind == FLOAT16:
        # A power of two takes the largest value to [2^14, 2^15): no overflow, and all of half precision's small end.
        shift = max(-128, min(127, 15 - math.frexp(largest)[1])) if largest else 0
        return struct.pack("<b", shift), _float16(values, shift), shift
    # Unbiased with a generator: v / scale is rounded up with the probability of its fraction.
    up = 0.5 if generator is None else generator.random(len(values))
    scale = int8_scale(largest)
    return struct.pack("<f", scale), _int8(values, scale, up), scale


def int8_scale(largest: float) -> float:
    """What a level of int8 stands for, where this is the largest magnitude.

    A step smaller than largest / 127, so that 127 times it is never above the largest float.
    """
    return float(max(np.nextafter(np.float32(largest / 127), np.float32(0)), np.finfo(np.float32).tiny))


def _numbers_received(received: ReceivedEntries, kind: int, scale: float) -> np.ndarray:
    """What was received as numbers of a kind, as both sides round it; -0 counts as 0."""
    numbers = received.numbers + np.float32(0)
    if kind == FLOAT32:
        return _bits(numbers)
    if kind == BFLOAT16:
        return _bfloat16(numbers)
    return _float16(numbers, int(scale)) if kind == FLOAT16 else _int8(numbers, scale, 0.5)


def _bits(values: np.ndarray) -> np.ndarray:
    bits: np.ndarray = values.view("<u4")
    return bits


def _bfloat16(values: np.ndarray) -> np.ndarray:
    """To nearest, ties to even: uint16 [n]."""
    bits = values.view("<u4").astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    overflown = rounded & 0x7F80 == 0x7F80
    rounded[overflown] = bits[overflown] >> 16  # the largest floats would round to infinity
    halves: np.ndarray = rounded.astype("<u2")
    return halves


def _float16(values: np.ndarray, shift: int) -> np.ndarray:
    """The bits of half floats, values * 2^shift, to nearest: uint16 [n]."""
    # 32752 is the largest half below 2^15; the largest floats, rounded up to 2^15, would come back as infinity.
    with np.errstate(over="ignore"):  # of what was received, which may be larger
        halves: np.ndarray = np.clip(np.ldexp(values, shift), -32752, 32752).astype("<f2").view("<u2")
    return halves


def _int8(values: np.ndarray, scale: float, up: np.ndarray | float) -> np.ndarray:
    """The levels of values / scale, rounded up where their fraction is not below 1 - `up`: uint8 [n]."""
    levels = np.floor(values / np.float64(scale) + up)
    clipped: np.ndarray = np.clip(levels, -127, 127).astype(np.int8).view(np.uint8)
    return clipped


def _difference(numbers: np.ndarray, received: np.ndarray) -> np.ndarray:
    """Numbers as differences from those received, uint8, 16 or 32 [n]."""
    if numbers.itemsize == 1:
        difference: np.ndarray = numbers - received
        return difference
    return subtract(numbers, received) if dispatch.UNAVAILABLE else native.subtract(numbers, received)


def _moved(received: np.ndarray, differences: np.ndarray) -> np.ndarray:
    """The numbers of which `_difference` made differences."""
    if differences.itemsize == 1:
        moved: np.ndarray = received + differences
        return moved
    return add(received, differences) if dispatch.UNAVAILABLE else native.add(received, differences)


def subtract(numbers: np.ndarray, received: np.ndarray) -> np.ndarray:
    """`_difference` of floats' bits, in numpy: steps from float to float, as a sign, and below it 0 for none."""
    return _turned(_turned(numbers) - _turned(received))


def add(received: np.ndarray, differences: np.ndarray) -> np.ndarray:
    """`_moved` of floats' bits, in numpy."""
    return _turned(_turned(received) + _turned(differences))


def _turned(bits: np.ndarray) -> np.ndarray:
    """A float's bits -> its place among all floats, and back: of a negative one the bits below the sign are inverted.

    The next larger float is one more, through zero too.
    """
    signs = bits.view(f"i{bits.itemsize}") >> (8 * bits.itemsize - 1)
    turned: np.ndarray = bits ^ (signs.view(bits.dtype) >> bits.dtype.type(1))
    return turned


def decode_values(reader: Reader, count: int, dtype: np.dtype, received: ReceivedEntries | None = None) -> np.ndarray:
    """The `count` finite values, of float32 or int64, that `encode_values` wrote; an array of their own.

    `received` is what the client received in their place, if they may refer to it.
    """
    kind = reader.byte()
    values: np.ndarray
    if kind == PLAIN:
        values = reader.array(dtype.str, count).copy()
    elif kind > INT8 + DIFFERENCES or dtype != np.float32:
        raise reader.refuse(f"has values of kind {kind}, expected 0 (plain) or, for float32, 1 to 8")
    elif kind <= INT8:
        values = _decode_numbers(reader, count, kind, None)
    elif received is None:
        raise reader.refuse(f"has values of kind {kind}, differences, and there is nothing that they could refer to")
    else:
        values = _decode_numbers(reader, count, kind - DIFFERENCES, received)
    if values.dtype == np.int64 and ((values > _LARGEST_COUNT) | (values < -_LARGEST_COUNT)).any():
        raise reader.refuse(f"holds counters from {values.min()} to {values.max()}, expected at most 2^53")
    if values.dtype == np.float32 and not np.isfinite(values).all():
        raise reader.refuse(f"holds {np.count_nonzero(~np.isfinite(values))} non-finite values (NaN or infinity)")
    return values


def _decode_numbers(reader: Reader, count: int, kind: int, received: ReceivedEntries | None) -> np.ndarray:
    """The floats of one of the kinds 1 to 4, or that have differences of it from what was received."""
    scale = 0.0
    if kind == FLOAT16:
        (scale,) = struct.unpack("<b", reader.take(1))
    elif kind == INT8:
        (scale,) = struct.unpack("<f", reader.take(4))
        if not 0 < scale < math.inf:
            raise reader.refuse(f"has an int8 scale of {scale}, expected a positive number")
    numbers = _merged(_decode_planes(reader, count, kind))
    if received is not None:
        numbers = _moved(_numbers_received(received, kind, scale), gather(received.classes, numbers))
    with np.errstate(all="ignore"):  # the caller refuses what overflows
        if kind == FLOAT16:
            floats: np.ndarray = np.ldexp(numbers.view("<f2").astype(np.float32), -int(scale))
            return floats
        if kind == BFLOAT16:
            return (numbers.astype("<u4") << 16).view("<f4")
        return numbers.view("<f4") if kind == FLOAT32 else numbers.view(np.int8) * np.float32(scale)


def _encode_planes(planes: np.ndarray) -> list[bytes]:
    """uint8 [planes, n], the most significant first -> `uint8 which of them are compressed`, and each one's bytes."""
    compressed_planes = 0
    parts: list[bytes] = []
    for number, plane in enumerate(planes):
        raw = plane.tobytes()
        frame = _ZSTD.compressor.compress(raw)
        if _is_worthwhile(len(frame), len(raw)):
            compressed_planes |= 1 << number
            parts += [struct.pack("<I", len(frame)), frame]
        else:
            parts.append(raw)
    return [bytes([compressed_planes]), *parts]


def _decode_planes(reader: Reader, count: int, kind: int) -> np.ndarray:
    """The planes, uint8 [planes, count], that `_encode_planes` wrote."""
    planes = np.empty((WIDTHS[kind], count), np.uint8)
    compressed_planes = reader.byte()
    if compressed_planes >> len(planes):
        raise reader.refuse(f"marks planes {compressed_planes:#x} as compressed, it has only {len(planes)}")
    for number, plane in enumerate(planes):
        is_compressed = compressed_planes >> number & 1
        plane[:] = _decompress(reader, count) if is_compressed else reader.array("u1", count)
    return planes


def _is_worthwhile(compressed_bytes: int, raw_bytes: int) -> bool:
    return compressed_bytes + 4 <= _WORTHWHILE * raw_bytes


def _decompress(reader: Reader, count: int) -> np.ndarray:
    """The `count` bytes of a zstd frame that declares just that size: nothing more is allocated."""
    frame = reader.take(reader.uint32())
    # A frame can be padded without end with blocks of nothing; an encoder would have sent such a plane as it is.
    if not _is_worthwhile(len(frame), count):
        raise reader.refuse(f"has a zstd frame of {len(frame)} bytes for {count}, which no encoder writes")
    try:
        if (size := zstandard.frame_content_size(frame)) != count:
            raise reader.refuse(f"has a zstd frame that declares {size} bytes, expected {count}")
        # Bytes after the frame, or a second one, would be read by nobody.
        plane = _ZSTD.decompressor.decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise reader.refuse(f"has a damaged zstd frame: {error}") from error
    return np.frombuffer(plane, np.uint8)


def _split(bits: np.ndarray) -> np.ndarray:
    """Bits, uint8, 16 or 32 [n] -> floats' rotated left by one, in planes of bytes, the highest first: uint8 [_, n]."""
    if bits.itemsize == 1:
        return bits[None]
    if bits.itemsize == 4 and not dispatch.UNAVAILABLE:
        return native.split_planes(bits)
    return split_planes(bits)


def _merged(planes: np.ndarray) -> np.ndarray:
    """The bits that `_split` split."""
    if len(planes) == 1:
        levels: np.ndarray = planes[0]
        return levels
    return native.merge_planes(planes) if len(planes) == 4 and not dispatch.UNAVAILABLE else merge_planes(planes)


def split_planes(bits: np.ndarray) -> np.ndarray:
    """`_split` in numpy."""
    rotated = bits << bits.dtype.type(1) | bits >> bits.dtype.type(8 * bits.itemsize - 1)
    planes: np.ndarray = rotated.view(np.uint8).reshape(len(bits), bits.itemsize).T[::-1]
    return planes


def merge_planes(planes: np.ndarray) -> np.ndarray:
    """`_merged` in numpy."""
    bits = np.ascontiguousarray(planes[::-1].T).view(f"<u{len(planes)}").reshape(-1)
    rotated: np.ndarray = bits >> bits.dtype.type(1) | bits << bits.dtype.type(8 * bits.itemsize - 1)
    return rotated
