"""The active entries, which the kernels look for near the last threshold: the same ones wherever that was."""

import math

import pytest
import torch

from tests.sparse.operands import ISAS, Geometry, _native, draw_operands, instruction_set, normal, train
from zerofl.sparse import dispatch
from zerofl.sparse.topk import count_top_k, top_k_threshold_by_sorting

pytestmark = pytest.mark.skipif(dispatch.UNAVAILABLE is not None, reason="needs the kernels")

# Of the threshold: within each bracket about the guess, on both of its sides, beyond them all; and none at all.
GUESSES = [0.999, 1.001, 0.98, 1.02, 0.95, 1.05, 0.8, 1.3, 1e-3, 1e3, 0.0, math.inf, math.nan]
GEOMETRIES = [
    Geometry(16, 6, 4, (11, 13), padding=(1, 1)),  # 13,728 activations, enough for a sample
    Geometry(2, 40, 30, (5, 5)),  # 10,800 weights
    Geometry(30, 300, 50, (1, 1), (1, 1)),  # a linear layer, with 15,000 weights
    Geometry(5, 7, 9, (6, 5)),  # too small for a sample
]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("sparsity", [0.3, 0.8, 0.95, 0.999])
def test_the_active_entries_are_the_same_wherever_the_threshold_was(
    isa: str, geometry: Geometry, sparsity: float
) -> None:
    operands = draw_operands(geometry, 0, normal, addend=not geometry.is_linear)
    tensors = operands.weight, operands.input.clamp_(min=-0.1)  # nearly as after ReLU: half of it hardly above zero
    counts = [count_top_k(x.numel(), sparsity) for x in tensors]
    thresholds = [top_k_threshold_by_sorting(x, k).item() for x, k in zip(tensors, counts, strict=True)]
    with instruction_set(isa):
        weight, input = (_native.AtLeast(t, k) for t, k in zip(thresholds, counts, strict=True))
        expected, *_ = train(operands, weight, input, threads=2)
        for guess in GUESSES:
            weight, input = (_native.TopK(k, guess * t) for t, k in zip(thresholds, counts, strict=True))
            actual, *found = train(operands, weight, input, threads=2)
            assert found == thresholds, guess
            for ours, theirs in zip(actual, expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
