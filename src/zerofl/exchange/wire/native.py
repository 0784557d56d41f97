"""What the native kernels do for the wire: the positions' entropy decoder, planes of bytes, and dealing to classes.

`zerofl.exchange.wire.entropy`, `values` and `received` have the specification of each, in libraries and numpy.
"""

import numpy as np

from zerofl.sparse.dispatch import native


def ans_decode(cumulative: np.ndarray, words: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, bool]:
    """The bytes that words, uint32, of `entropy.encode_bitmaps` hold, and whether they hold just so many.

    Of each model there are `sizes`, int64 [models]; `cumulative`, uint32 [models, 257], are the sums of the bytes'
    probabilities.
    """
    bitmaps = np.empty(int(sizes.sum()), np.uint8)
    return bitmaps, native.ans_decode(cumulative.reshape(-1), sizes, words, bitmaps)


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


def largest_magnitude(numbers: np.ndarray) -> int:
    """`received.largest_magnitude`."""
    largest: int = native.largest_magnitude(numbers)
    return largest


def magnitude_classes(numbers: np.ndarray, largest: int) -> np.ndarray:
    """`received.magnitude_classes`."""
    classes = np.empty(len(numbers), np.uint8)
    native.magnitude_classes(numbers, largest, classes)
    return classes


def count_classes(classes: np.ndarray) -> np.ndarray:
    """`received.sizes_of`."""
    sizes = np.empty(24, np.int64)
    native.count_classes(classes, sizes)
    return sizes


def deal_bits(classes: np.ndarray, sizes: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """`received.deal_bits`."""
    dealt = np.empty(int((-(-sizes // 8)).sum()), np.uint8)
    native.deal_bits(classes, sizes, bits, dealt)
    return dealt


def gather_bits(classes: np.ndarray, sizes: np.ndarray, dealt: np.ndarray) -> np.ndarray:
    """`received.gather_bits`."""
    bits = np.empty(-(-len(classes) // 8), np.uint8)
    native.gather_bits(classes, sizes, dealt, bits)
    return bits


def deal(classes: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """`received.deal`."""
    dealt = np.empty_like(numbers)
    native.deal(classes, numbers, dealt)
    return dealt


def gather(classes: np.ndarray, dealt: np.ndarray) -> np.ndarray:
    """`received.gather`."""
    numbers = np.empty_like(dealt)
    native.gather(classes, dealt, numbers)
    return numbers


def subtract(numbers: np.ndarray, received: np.ndarray) -> np.ndarray:
    """`values.subtract`."""
    differences = np.empty_like(numbers)
    native.subtract(numbers, received, differences)
    return differences


def add(received: np.ndarray, differences: np.ndarray) -> np.ndarray:
    """`values.add`."""
    numbers = np.empty_like(differences)
    native.add(received, differences, numbers)
    return numbers
