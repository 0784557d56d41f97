"""The arguments of the kernels' step; what it computes is in operands.py, with every product."""

import pytest
import torch

from zerofl.sparse import dispatch

pytestmark = pytest.mark.skipif(dispatch.UNAVAILABLE is not None, reason="needs the kernels")


def test_the_kernels_step_is_of_the_weights_shape_and_instead_of_its_gradient() -> None:
    native = dispatch.native
    x, output = torch.ones(5, 3), torch.ones(8, 3)
    linear = native.Linear(x, torch.ones(8, 5), None, output, native.TopK(9), native.TopK(9), True, 1)
    weight, gradient = torch.zeros(8, 5), torch.zeros(8, 5)
    with pytest.raises(ValueError, match="grad_weight and sgd: expected one of them"):
        linear.backward(output, None, gradient, 1, native.Sgd(weight, None, 0.1, 0.0, 0.0))
    for shape in ((8, 4), (40,), (5, 8)):
        with pytest.raises(ValueError, match="the weight of sgd does not have the shape"):
            linear.backward(output, None, None, 1, native.Sgd(torch.zeros(shape), None, 0.1, 0.0, 0.0))
    with pytest.raises(ValueError, match="velocity is not as large as the weight"):
        native.Sgd(weight, torch.zeros(3), 0.1, 0.9, 0.0)
    for wrong in (weight.double(), weight.T):
        with pytest.raises(TypeError):
            native.Sgd(wrong, None, 0.1, 0.0, 0.0)
    assert not weight.count_nonzero()
    linear.backward(output, None, None, 1, native.Sgd(weight, None, 0.1, 0.0, 0.0))
    assert weight.count_nonzero()
