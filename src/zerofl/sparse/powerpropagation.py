"""Powerpropagation: SGD on v, of which a weight is v |v|^(alpha - 1), so that small weights move less, large ones more.

Schwarz et al., 2021, section 2; in federated learning Guastella et al., SparsyFed, 2025. The model has the weights as
ever. What is kept of v between two steps is nothing: v = sign(w) |w|^(1 / alpha) is made of the weight in each.
"""

import torch
from torch import Tensor


@torch.no_grad()
def powered_step_(
    weight: Tensor,
    gradient: Tensor,
    velocity: Tensor | None,
    lr: float | Tensor,
    momentum: float,
    weight_decay: float,
    alpha: float,
) -> None:
    """A step of SGD on v, in place on `weight`; momentum and weight decay are those of v, the gradient the weight's.

    This is what the kernels do in the backward pass (`cpp/kernels/power.h`). A weight that is zero stays zero.

    Args:
        weight: of any shape.
        gradient: of the loss by the weight, of the same shape.
        velocity: v's, of the same shape, which is updated; None without momentum.
        lr: the learning rate.
        momentum: as torch.optim.SGD's, without dampening.
        weight_decay: the L2 penalty, on v.
        alpha: the exponent, at least 1, where it is SGD on the weight.
    """
    size = weight.abs()
    v = size.pow(1 / alpha).copysign(weight)
    gradient = gradient * (alpha * size.pow((alpha - 1) / alpha))  # |v|^(alpha - 1)
    if weight_decay:
        gradient = gradient + weight_decay * v
    if velocity is not None:
        gradient = velocity.mul_(momentum).add_(gradient)
    moved = v - lr * gradient
    # One that does not move keeps its bits, which v's rounding would change.
    weight.copy_(torch.where(moved == v, weight, moved * moved.abs().pow(alpha - 1)))
