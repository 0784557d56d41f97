"""What `precision` switches on a GPU. PyTorch's switches are there without one."""

import threading
from typing import Any

import pytest
import torch

from zerofl.fl.precision import arithmetic


def switches() -> dict[str, Any]:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    of_products = (
        (matmul.fp32_precision, cudnn.conv.fp32_precision)
        if hasattr(cudnn, "conv")
        else (matmul.allow_tf32, cudnn.allow_tf32)
    )
    return {"tf32": of_products, "deterministic": cudnn.deterministic, "benchmark": cudnn.benchmark}


@pytest.mark.parametrize(("precision", "allowed"), [("float32", False), ("bfloat16", False), ("tf32", True)])
def test_tf32_is_allowed_where_it_is_asked_for_and_all_is_put_back(precision: str, allowed: bool) -> None:
    before = switches()
    with arithmetic(precision, "cuda"):
        within = switches()
        assert within["tf32"] in [(("tf32",) * 2 if allowed else ("ieee",) * 2), (allowed, allowed)]
        assert within["deterministic"] is True
        assert within["benchmark"] is False
        with arithmetic(precision, "cuda:1"):
            pass
        assert switches() == within  # until the outer one ends
    assert switches() == before


def test_an_error_puts_them_back() -> None:
    before = switches()
    with pytest.raises(ZeroDivisionError), arithmetic("float32", "cuda"):
        raise ZeroDivisionError
    assert switches() == before


def test_nothing_is_switched_on_a_cpu() -> None:
    before = switches()
    with arithmetic("tf32", "cpu"):
        assert switches() == before


def test_another_precision_waits_and_the_same_does_not() -> None:
    order: list[str] = []

    def other() -> None:
        with arithmetic("tf32", "cuda"):
            order.append("tf32")

    def same() -> None:
        with arithmetic("float32", "cuda"):
            order.append("same")

    with arithmetic("float32", "cuda"):
        waiting, beside = threading.Thread(target=other), threading.Thread(target=same)
        waiting.start()
        beside.start()
        beside.join()
        order.append("outer")
    waiting.join()
    assert order == ["same", "outer", "tf32"]


def test_another_precision_within_is_an_error_and_no_wait() -> None:
    before = switches()
    with arithmetic("float32", "cuda"):
        with (
            pytest.raises(RuntimeError, match=r"^precision = 'tf32' within a block of another"),
            arithmetic("tf32", "cuda"),
        ):
            pass
        with arithmetic("bfloat16", "cuda"):  # whose other products are float32's
            pass
    assert switches() == before
