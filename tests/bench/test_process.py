"""A function in a process of its own, and an interrupt in the meantime."""

import os
import signal
import subprocess
import sys

from zerofl.bench.process import in_own_process


def interrupt_itself() -> int:
    """As a terminal's Ctrl-C does, which is for all processes there."""
    os.kill(os.getpid(), signal.SIGINT)
    return os.getpid()


def interrupt_the_other() -> None:
    os.kill(os.getppid(), signal.SIGINT)
    signal.pause()


def test_an_interrupt_is_not_for_the_other_process() -> None:
    assert in_own_process(interrupt_itself) != os.getpid()


def test_an_interrupt_ends_the_other_process() -> None:
    code = """
from tests.bench.test_process import in_own_process, interrupt_the_other
if __name__ == "__main__":
    try:
        in_own_process(interrupt_the_other)
    except KeyboardInterrupt:
        print("interrupted")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "interrupted\n", "")
