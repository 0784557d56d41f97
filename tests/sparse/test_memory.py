"""Memory that is kept between steps, and the choice of an instruction set."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.sparse.operands import _native


def test_memory() -> None:
    for shape in [(), (0,), (3, 0, 2), (1,), (5, 7), (300, 301)]:
        x = _native.empty(shape)
        assert (x.shape, x.dtype, x.is_contiguous()) == (torch.Size(shape), torch.float32, True)
        x.fill_(1.0)
    refused: list[Any] = [(-1,), (2**62,), (2**31, 2**31, 2**31), (1.5,), "x", None, (2**70,)]
    for shape in refused:
        with pytest.raises((ValueError, TypeError)):
            _native.empty(shape)
    with pytest.raises(MemoryError):
        _native.empty((2**50,))


def test_memory_in_use_is_nobody_elses() -> None:
    generator = torch.Generator().manual_seed(0)
    held: list[tuple[Tensor, int]] = []
    for value in range(300):
        x = _native.empty((int(torch.randint(1, 200_000, (), generator=generator)),))
        held.append((x.fill_(value), value))
        if len(held) > 10:
            del held[int(torch.randint(len(held), (), generator=generator))]
        for tensor, own in held:
            assert tensor[0] == tensor[-1] == own
    for tensor, own in held:
        assert (tensor == own).all()


def test_an_unknown_instruction_set_is_refused() -> None:
    before = _native.isa()
    with pytest.raises(ValueError, match="this processor has no sse9"):
        _native.set_isa("sse9")
    assert _native.isa() == before
