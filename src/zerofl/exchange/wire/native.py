"""What the native kernels do for the wire: the positions' entropy decoder, and planes of bytes.

`zerofl.exchange.wire.entropy` and `values` have the specification of each, in libraries and numpy.
"""

import numpy as np

from zerofl.sparse.dispatch import native


def ans_decode(cumulative: np.ndarray, words: np.ndarray, size: int) -> tuple[np.ndarray, bool]:
    """The `size` bytes that words, uint32, of `entropy.encode_bitmap` hold, and whether they hold just so many.

    `cumulative`, uint32 [257], are the sums of the bytes' probabilities.
    """
    bitmap = np.empty(size, np.uint8)
    return bitmap, native.ans_decode(cumulative, words, bitmap)


def split_planes(numbers: np.ndarray) -> np.ndarray:
    """uint32 [n] -> its bits rotated left by one, in planes of bytes, the highest first: uint8 [4, n]."""
    planes = np.empty((4, len(numbers)), np.uint8)
    native.split_planes(numbers, planes.reshape(-1))
    return planes


def merge_planes(planes: np.ndarray) -> np.ndarray:
    """The numbers, uint32 [n], that `split_planes` split."""
    numbers = np.empty(planes.shape[1], np.uint32)
    native.merge_planes(planes.reshape(-1), numbers)
    return numbers
