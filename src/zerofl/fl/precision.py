"""The arithmetic of a GPU: what an experiment's `precision` says, and the same result every time.

PyTorch's switches for it are of the whole process, so they are set where training and evaluation begin, counted, and
put back where the last of them ends.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_condition = threading.Condition()
_users: list[tuple[int, bool]] = []  # of each block that is entered: its thread, and whether TF32 is allowed
_before: list[tuple[Any, str, Any]] = []


@contextmanager
def arithmetic(precision: str, device: str) -> Iterator[None]:
    """Within the block a GPU computes as `precision` says, and cuDNN takes only deterministic algorithms.

    TF32, in which a GPU rounds the factors of a float32 product to 10 bits, is allowed with "tf32" alone; PyTorch's own
    default allows it in convolutions. A CPU has no such switch, and nothing is done there. Blocks may be nested and
    entered by several threads; one with another `precision` waits until those inside have left.

    Raises:
        RuntimeError: this thread is in a block of another precision, for which it would wait for ever.
    """
    if device == "cpu":
        yield
        return
    user = threading.get_ident(), precision == "tf32"
    tf32 = user[1]
    with _condition:
        if (user[0], not tf32) in _users:
            raise RuntimeError(f"precision = {precision!r} within a block of another: leave that one first")
        _condition.wait_for(lambda: not _users or _users[0][1] == tf32)
        if not _users:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS promises no determinism
            _before[:] = [(owner, name, getattr(owner, name)) for owner, name, _ in _switches(tf32)]
            _set(_switches(tf32))
        _users.append(user)
    try:
        yield
    finally:
        with _condition:
            _users.remove(user)
            if not _users:
                _set(_before)
                _condition.notify_all()


def _switches(tf32: bool) -> list[tuple[Any, str, Any]]:
    """PyTorch's switches as (owner, name, value)."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    reproducible: list[tuple[Any, str, Any]] = [(cudnn, "deterministic", True), (cudnn, "benchmark", False)]
    if hasattr(cudnn, "conv"):  # since torch 2.9, which refuses a mixture with the older names
        value = "tf32" if tf32 else "ieee"
        return [(matmul, "fp32_precision", value), (cudnn.conv, "fp32_precision", value), *reproducible]
    return [(matmul, "allow_tf32", tf32), (cudnn, "allow_tf32", tf32), *reproducible]


def _set(switches: list[tuple[Any, str, Any]]) -> None:
    for owner, name, value in switches:
        setattr(owner, name, value)
