"""A function in a process of its own, and an interrupt in the meantime."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable

from zerofl.bench.process import in_own_process


def interrupt_both() -> None:
    """As a terminal's Ctrl-C does: it is for the whole group of processes."""
    os.killpg(os.getpgrp(), signal.SIGINT)
    signal.pause()


class InterruptsBoth:
    """When it arrives in the other process, which is then outside of what it runs."""

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return interrupt_both, ()


def test_the_result_is_of_another_process() -> None:
    assert in_own_process(os.getpid) != os.getpid()


def test_an_interrupt_is_for_the_first_process_and_ends_the_other() -> None:
    code = """
from tests.test_bench_process import InterruptsBoth, in_own_process
if __name__ == "__main__":
    try:
        in_own_process(id, InterruptsBoth())
    except KeyboardInterrupt:
        print("interrupted")
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, start_new_session=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "interrupted\n", "")
