"""Arrays of bytes at their entropy: asymmetric numeral systems by the library constriction.

The models are built from whole numbers with divisions and products of doubles only, which every IEEE machine rounds
alike, so that both sides have the same one.
"""

import struct

import constriction
import numpy as np

from zerofl.wire.reader import Reader

AnsCoder = constriction.stream.stack.AnsCoder
Categorical = constriction.stream.model.Categorical


def encode_symbols(symbols: np.ndarray, probabilities: np.ndarray) -> bytes:
    """`uint32 words; words x uint32` for symbols uint8 [n], each below len(probabilities)."""
    coder = AnsCoder()
    coder.encode_reverse(symbols.astype(np.int32), Categorical(probabilities, perfect=False))
    words = coder.get_compressed()
    return b"".join([struct.pack("<I", len(words)), words.astype("<u4").tobytes()])


def decode_symbols(reader: Reader, count: int, probabilities: np.ndarray) -> np.ndarray:
    """The `count` symbols, uint8, that `encode_symbols` wrote."""
    words = reader.array("<u4", reader.uint32()).astype(np.uint32)
    try:
        coder = AnsCoder(words)
    except ValueError as error:
        raise reader.refuse(f"has words that no encoder writes: {error}") from error
    symbols: np.ndarray = coder.decode(Categorical(probabilities, perfect=False), count).astype(np.uint8)
    if not coder.is_empty():
        raise reader.refuse(f"has words that hold more than its {count} symbols")
    return symbols


def mask_byte_probabilities(count: int, numel: int) -> np.ndarray:
    """The probability of each of the 256 bytes of a bitmap whose bits are one with probability count / numel."""
    one = count / numel
    of_ones = [1.0]
    for _ in range(8):
        of_ones.append(of_ones[-1] * one)
    of_zeros = [1.0]
    for _ in range(8):
        of_zeros.append(of_zeros[-1] * (1.0 - one))
    return np.array([of_ones[byte.bit_count()] * of_zeros[8 - byte.bit_count()] for byte in range(256)])
