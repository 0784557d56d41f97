"""Which layers are sparse where nobody names them: told by shapes, so that an uplink that sees only arrays agrees."""

from collections.abc import Mapping, Sequence


def default_by_shape(shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """Which of a model's convolutions and linear layers are sparse by default, by the shapes of their weights.

    Those with a kernel above 1x1 and the linear ones, except the first convolution and the last linear layer, which the
    paper keeps dense too, and except depthwise convolutions, whose filters read one channel each: a handful of weights
    that the signal cannot do without. A model with depthwise convolutions has its weights in the 1x1 ones, and these
    are sparse too, squeeze-and-excitation's among them; without a linear layer the last of them is the classifier, and
    stays dense.

    Args:
        shapes: by name and in the model's order [O, C / groups, kH, kW] of the convolutions and [O, I] of the linears.
    """
    kernels = [name for name, shape in shapes.items() if len(shape) == 4]
    matrices = [name for name, shape in shapes.items() if len(shape) == 2]
    depthwise = [name for name in kernels[1:] if shapes[name][1] == 1]
    pointwise = [name for name in kernels[1:] if tuple(shapes[name][2:]) == (1, 1) and name not in depthwise]
    dense = {*kernels[:1], *matrices[-1:], *depthwise}
    if not any(shapes[name][0] > 1 and tuple(shapes[name][2:]) != (1, 1) for name in depthwise):
        dense.update(pointwise)
    elif not matrices:
        dense.update(pointwise[-1:])
    return [name for name in shapes if name not in dense]
