"""Bitmaps at their entropy: asymmetric numeral systems, a byte at a time.

The library constriction defines the bytes, and writes them. The native kernels, where they are installed, read them in
a quarter of its time. The model is built from whole numbers with divisions, products and sums of doubles only, which
every IEEE machine rounds alike, so that both sides have the same one.
"""

import struct
from typing import Any

import constriction
import numpy as np

from zerofl.exchange.wire import native
from zerofl.exchange.wire.reader import Reader
from zerofl.sparse import dispatch

AnsCoder = constriction.stream.stack.AnsCoder
Categorical = constriction.stream.model.Categorical
_BYTES = np.arange(256, dtype=np.uint32)
_PRECISION = 24  # bits of a probability


def encode_bitmap(bitmap: np.ndarray, count: int, numel: int) -> bytes:
    """`uint32 words; words x uint32` for the bitmap, uint8, of `numel` entries of which `count` are set."""
    coder = AnsCoder()
    coder.encode_reverse(bitmap.astype(np.int32), _byte_model(count, numel))
    words = coder.get_compressed()
    return b"".join([struct.pack("<I", len(words)), words.astype("<u4").tobytes()])


def decode_bitmap(reader: Reader, count: int, numel: int) -> np.ndarray:
    """The bitmap, uint8 [ceil(numel / 8)], that `encode_bitmap` wrote, or that a hostile client made up."""
    words = reader.array("<u4", reader.uint32()).astype(np.uint32)
    if len(words) and not words[-1]:
        raise reader.refuse("has words that end in 0, which no encoder writes")
    decode = decode_with_constriction if dispatch.UNAVAILABLE else decode_natively
    bitmap, is_all = decode(words, count, numel)
    if not is_all:
        raise reader.refuse(f"has words that hold more than its bitmap of {len(bitmap)} bytes")
    return bitmap


def decode_with_constriction(words: np.ndarray, count: int, numel: int) -> tuple[np.ndarray, bool]:
    """The bitmap, uint8 [ceil(numel / 8)], and whether it is all that the words, of which the last is not 0, hold."""
    coder = AnsCoder(words)
    bitmap: np.ndarray = coder.decode(_byte_model(count, numel), -(-numel // 8)).astype(np.uint8)
    return bitmap, coder.is_empty()


def decode_natively(words: np.ndarray, count: int, numel: int) -> tuple[np.ndarray, bool]:
    """`decode_with_constriction`, on the native kernels."""
    return native.ans_decode(cumulative(count, numel), words, -(-numel // 8))


def _byte_model(count: int, numel: int) -> Any:
    return Categorical(_probabilities(count, numel), perfect=False)


def cumulative(count: int, numel: int) -> np.ndarray:
    """The sums of the first bytes' probabilities in units of 2^-24, uint32 [257]; each byte has at least one unit.

    These are the ones of constriction's Categorical with perfect = False.
    """
    sums = np.concatenate([[0.0], np.cumsum(_probabilities(count, numel))])
    units = sums[:-1] * ((2**_PRECISION - len(_BYTES)) / sums[-1])
    return np.append(units.astype(np.uint32) + _BYTES, np.uint32(2**_PRECISION))


def _probabilities(count: int, numel: int) -> np.ndarray:
    """The probability of each of the 256 bytes of a bitmap whose bits are set with probability count / numel."""
    p = count / numel
    of_ones, of_zeros = [1.0], [1.0]
    for _ in range(8):
        of_ones.append(of_ones[-1] * p)
        of_zeros.append(of_zeros[-1] * (1.0 - p))
    ones = np.bitwise_count(_BYTES)
    probabilities: np.ndarray = np.array(of_ones)[ones] * np.array(of_zeros)[8 - ones]
    return probabilities
