"""What the client received, as both sides have it: the classes of magnitude by which an update's entries are dealt.

Training moves a weight little, so that what was received tells much of what comes back: of the largest weights nearly
all are sent again, of the small ones hardly any, and their values are near. The classes are a function of the received
numbers' bits, in whole numbers, which every machine computes alike.
"""

import zlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from zerofl.exchange.update import State, entries_at
from zerofl.exchange.wire import native
from zerofl.exchange.wire.schema import Schema
from zerofl.sparse import dispatch

CLASSES = 24
_HALF_OCTAVE = 22  # the bits of a float below
_MAGNITUDE, _INFINITY = 0x7FFFFFFF, 0x7F800000


class ReceivedEntries(NamedTuple):
    """Some numbers as the client received them, float32 [n], and the class of each, uint8 [n]."""

    numbers: np.ndarray
    classes: np.ndarray


class ReceivedTensor(NamedTuple):
    """A tensor as the client received it: its entries, how many each class has, int64 [24], and the largest's bits."""

    entries: ReceivedEntries
    sizes: np.ndarray
    largest: int

    def at(self, bits: Tensor) -> ReceivedEntries:
        """The entries that have a bit, uint8 [ceil(n / 8)]."""
        numbers = entries_at(torch.from_numpy(self.entries.numbers), bits).numpy()
        return ReceivedEntries(numbers, classes_of(numbers, self.largest))


@dataclass(frozen=True)
class Received:
    """The model that the client received, as both sides refer to it: made once a round, it serves for all updates.

    Beside the model's own numbers it takes a byte for each. A tensor is left out if it is not float32, or empty, or
    holds NaN or infinity.
    """

    checksum: int
    tensors: dict[str, ReceivedTensor]


def received_model(state: State, schema: Schema) -> Received:
    """What can be referred to of a model that was received; its numbers are the state's own, on the CPU.

    Raises:
        ValueError: a tensor that is missing, or of another shape or type than the schema's.
    """
    crc, tensors = 0, dict[str, ReceivedTensor]()
    for name, shape, dtype in schema.tensors:
        tensor = state.get(name)
        if tensor is None or (tensor.shape, tensor.dtype) != (shape, dtype):
            has = "missing" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
            raise ValueError(f"the received model's {name!r} is {has}, the schema says {dtype} {tuple(shape)}")
        numbers = tensor.detach().cpu().contiguous().view(-1).numpy()
        crc = zlib.crc32(numbers.astype(numbers.dtype.newbyteorder("<"), copy=False).data, crc)
        if dtype == torch.float32 and len(numbers) and (largest := largest_magnitude(numbers)) < _INFINITY:
            classes = classes_of(numbers, largest)
            tensors[name] = ReceivedTensor(ReceivedEntries(numbers, classes), sizes_of(classes), largest)
    return Received(crc, tensors)


def largest_magnitude(numbers: np.ndarray) -> int:
    """The bits of the largest magnitude in float32 [n], above 0 entries."""
    if not dispatch.UNAVAILABLE:
        return native.largest_magnitude(numbers)
    return int((numbers.view(np.uint32) & _MAGNITUDE).max())


def classes_of(numbers: np.ndarray, largest: int) -> np.ndarray:
    """The class of each number, float32 [n] -> uint8 [n]: half octaves below the largest magnitude.

    The last class has those up to half an octave below, class 0 zero and all that is small beside the largest.
    """
    return (magnitude_classes if dispatch.UNAVAILABLE else native.magnitude_classes)(numbers, largest)


def magnitude_classes(numbers: np.ndarray, largest: int) -> np.ndarray:
    """`classes_of` in numpy."""
    steps = (numbers.view(np.uint32) & _MAGNITUDE).view(np.int32) >> _HALF_OCTAVE
    classes: np.ndarray = np.maximum(steps - (largest >> _HALF_OCTAVE) + CLASSES - 1, 0).astype(np.uint8)
    return classes


def sizes_of(classes: np.ndarray) -> np.ndarray:
    """How many entries each class has: int64 [24]."""
    if not dispatch.UNAVAILABLE:
        return native.count_classes(classes)
    return np.bincount(classes, minlength=CLASSES)


def deal_bits(classes: np.ndarray, sizes: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """A bitmap -> one for each class, of its entries' bits in their order, each in whole bytes of its own: uint8."""
    if not dispatch.UNAVAILABLE:
        return native.deal_bits(classes, sizes, bits)
    mask = np.unpackbits(bits, count=len(classes))
    return np.concatenate([np.packbits(mask[classes == number]) for number in range(CLASSES)])


def gather_bits(classes: np.ndarray, sizes: np.ndarray, dealt: np.ndarray) -> np.ndarray:
    """The bitmap that `deal_bits` dealt."""
    if not dispatch.UNAVAILABLE:
        return native.gather_bits(classes, sizes, dealt)
    mask, begin = np.empty(len(classes), np.uint8), 0
    for number, size in enumerate(sizes):
        end = begin + -(-size // 8)
        mask[classes == number] = np.unpackbits(dealt[begin:end], count=size)
        begin = end
    return np.packbits(mask)


def deal(classes: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Numbers, of 1, 2 or 4 bytes without a sign, -> those of class 0 in their order, those of class 1, and so on."""
    if not dispatch.UNAVAILABLE:
        return native.deal(classes, numbers)
    return numbers[np.argsort(classes, kind="stable")]


def gather(classes: np.ndarray, dealt: np.ndarray) -> np.ndarray:
    """The numbers that `deal` dealt."""
    if not dispatch.UNAVAILABLE:
        return native.gather(classes, dealt)
    numbers = np.empty_like(dealt)
    numbers[np.argsort(classes, kind="stable")] = dealt
    return numbers
