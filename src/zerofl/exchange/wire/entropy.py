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


def encode_bitmaps(bitmaps: np.ndarray, counts: np.ndarray, numels: np.ndarray) -> bytes:
    """`uint32 words; words x uint32` for bitmaps, uint8, one after another: of numels[0] entries, and so on.

    Each begins with a byte of its own and has its count of bits set, at least one and not all.
    """
    coder, end = AnsCoder(), len(bitmaps)
    bytes_ = bitmaps.astype(np.int32)
    for model, numel in reversed([*zip(_byte_models(counts, numels), numels, strict=True)]):
        begin = end - -(-int(numel) // 8)
        coder.encode_reverse(bytes_[begin:end], model)
        end = begin
    words = coder.get_compressed()
    return b"".join([struct.pack("<I", len(words)), words.astype("<u4").tobytes()])


def decode_bitmaps(reader: Reader, counts: np.ndarray, numels: np.ndarray) -> np.ndarray:
    """The bitmaps, uint8, one after another, that `encode_bitmaps` wrote, or that a hostile client made up."""
    words = reader.array("<u4", reader.uint32()).astype(np.uint32)
    if len(words) and not words[-1]:
        raise reader.refuse("has words that end in 0, which no encoder writes")
    decode = decode_with_constriction if dispatch.UNAVAILABLE else decode_natively
    bitmaps, is_all = decode(words, counts, numels)
    if not is_all:
        raise reader.refuse(f"has words that hold more than its bitmap of {len(bitmaps)} bytes")
    return bitmaps


def decode_with_constriction(words: np.ndarray, counts: np.ndarray, numels: np.ndarray) -> tuple[np.ndarray, bool]:
    """The bitmaps, uint8, and whether they are all that the words, of which the last is not 0, hold."""
    coder = AnsCoder(words)
    bitmaps = [
        coder.decode(model, -(-int(numel) // 8)).astype(np.uint8)
        for model, numel in zip(_byte_models(counts, numels), numels, strict=True)
    ]
    return np.concatenate([np.empty(0, np.uint8), *bitmaps]), coder.is_empty()


def decode_natively(words: np.ndarray, counts: np.ndarray, numels: np.ndarray) -> tuple[np.ndarray, bool]:
    """`decode_with_constriction`, on the native kernels."""
    return native.ans_decode(cumulative(counts, numels), words, -(-numels // 8))


def _byte_models(counts: np.ndarray, numels: np.ndarray) -> list[Any]:
    return [Categorical(probabilities, perfect=False) for probabilities in _probabilities(counts, numels)]


def cumulative(counts: np.ndarray, numels: np.ndarray) -> np.ndarray:
    """The sums of the first bytes' probabilities in units of 2^-24, uint32 [n, 257]; each byte has at least one unit.

    These are the ones of constriction's Categorical with perfect = False.
    """
    sums = np.cumsum(_probabilities(counts, numels), axis=1)
    units = np.zeros((len(sums), len(_BYTES) + 1), np.uint32)
    units[:, 1:] = sums * ((2**_PRECISION - len(_BYTES)) / sums[:, -1:])
    units[:, :-1] += _BYTES
    units[:, -1] = 2**_PRECISION
    return units


def _probabilities(counts: np.ndarray, numels: np.ndarray) -> np.ndarray:
    """Of each of the 256 bytes of bitmaps whose bits are set with probability count / numel: [n, 256]."""
    p = counts / numels
    of_ones, of_zeros = [np.ones_like(p)], [np.ones_like(p)]
    for _ in range(8):
        of_ones.append(of_ones[-1] * p)
        of_zeros.append(of_zeros[-1] * (1.0 - p))
    ones = np.bitwise_count(_BYTES)
    return np.ascontiguousarray(np.stack(of_ones, 1)[:, ones] * np.stack(of_zeros, 1)[:, 8 - ones])
