"""Imports that take seconds, during which somebody may press Ctrl-C."""

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

INTERRUPTED, TERMINATED = 130, 143
"""The shell's exit statuses for Ctrl-C and for SIGTERM."""


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Import something large: an interrupt ends the process at once, as nothing is to be cleaned up.

    An exception would not do: NumPy takes it for a failed part and continues with half of itself, PyTorch aborts.
    """

    def leave(signum: int, frame: FrameType | None) -> None:
        say_interrupted()
        os._exit(INTERRUPTED)

    raises = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # in the background it may be ignored
    if raises:
        signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        if raises:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def say_interrupted() -> None:
    """Say that the command was interrupted."""
    with contextlib.suppress(OSError):
        os.write(2, b"zerofl: interrupted\n")  # not through a stream, in which it may have come
