"""Taking a payload apart from front to back, never past its end."""

import struct

import numpy as np

from zerofl.errors import ZeroFLError


class WireError(ZeroFLError, ValueError):
    """A payload that is not a well-formed update for the model; the message says what is wrong, and in which tensor."""


class Reader:
    """What is left of a payload. `what` names the part that is being read, for errors."""

    def __init__(self, payload: bytes) -> None:
        self._view = memoryview(payload)
        self.what = "the header"

    @property
    def left(self) -> int:
        """Bytes not taken yet."""
        return len(self._view)

    def take(self, size: int) -> memoryview:
        """The next `size` bytes."""
        if size > self.left:
            raise WireError(f"the payload ends within {self.what}: {size} bytes expected, {self.left} left")
        taken, self._view = self._view[:size], self._view[size:]
        return taken

    def byte(self) -> int:
        """The next byte."""
        return self.take(1)[0]

    def uint32(self) -> int:
        """The next little-endian uint32."""
        value: int = struct.unpack("<I", self.take(4))[0]
        return value

    def array(self, dtype: str, count: int) -> np.ndarray:
        """The next `count` numbers, a read-only view of the payload."""
        numpy_dtype = np.dtype(dtype)
        return np.frombuffer(self.take(count * numpy_dtype.itemsize), numpy_dtype)

    def refuse(self, problem: str) -> WireError:
        """The error for a problem in the part that is being read; raise it."""
        return WireError(f"{self.what} {problem}")
