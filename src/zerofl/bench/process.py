"""A function in a fresh process, where nothing else has asked for memory or chosen an instruction set."""

import multiprocessing
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


def in_own_process(function: Callable[..., T], *arguments: Any) -> T:
    """The function's result. An interrupt (Ctrl-C) is for this process alone, and ends the other one."""
    others = multiprocessing.active_children()
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            # A terminal sends Ctrl-C to both. The other process inherits what is blocked when it starts: it would
            # print where it was, from its first import on.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                future = pool.submit(function, *arguments)
            finally:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            return future.result()
        except KeyboardInterrupt:
            for child in multiprocessing.active_children():
                if child not in others:  # the pool's, which it would wait for
                    child.kill()
            raise
