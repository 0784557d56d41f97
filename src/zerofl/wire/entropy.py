"""Bitmaps at their entropy: asymmetric numeral systems by the library constriction, a byte at a time.

The model is built from whole numbers with divisions and products of doubles only, which every IEEE machine rounds
alike, so that both sides have the same one.
"""

import struct
from typing import Any

import constriction
import numpy as np

from zerofl.wire.reader import Reader

AnsCoder = constriction.stream.stack.AnsCoder
Categorical = constriction.stream.model.Categorical


def encode_bitmap(bitmap: np.ndarray, count: int, numel: int) -> bytes:
    """`uint32 words; words x uint32` for the bitmap, uint8, of `numel` entries of which `count` are set."""
    coder = AnsCoder()
    coder.encode_reverse(bitmap.astype(np.int32), _byte_model(count, numel))
    words = coder.get_compressed()
    return b"".join([struct.pack("<I", len(words)), words.astype("<u4").tobytes()])


def decode_bitmap(reader: Reader, count: int, numel: int) -> np.ndarray:
    """The bitmap, uint8 [ceil(numel / 8)], that `encode_bitmap` wrote, or that a hostile client made up."""
    size = -(-numel // 8)
    words = reader.array("<u4", reader.uint32()).astype(np.uint32)
    try:
        coder = AnsCoder(words)
    except ValueError as error:
        raise reader.refuse(f"has words that no encoder writes: {error}") from error
    bitmap: np.ndarray = coder.decode(_byte_model(count, numel), size).astype(np.uint8)
    if not coder.is_empty():
        raise reader.refuse(f"has words that hold more than its bitmap of {size} bytes")
    return bitmap


def _byte_model(count: int, numel: int) -> Any:
    """The probability of each of the 256 bytes of a bitmap whose bits are set with probability count / numel."""
    p = count / numel
    of_ones, of_zeros = [1.0], [1.0]
    for _ in range(8):
        of_ones.append(of_ones[-1] * p)
        of_zeros.append(of_zeros[-1] * (1.0 - p))
    probabilities = [of_ones[byte.bit_count()] * of_zeros[8 - byte.bit_count()] for byte in range(256)]
    return Categorical(np.array(probabilities), perfect=False)
