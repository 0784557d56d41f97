"""The arithmetic of training, dense and with SWAT, counted from the layers' shapes."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from zerofl.data import Dataset
from zerofl.experiment import Experiment
from zerofl.fl.train import empty_model
from zerofl.models import build_model
from zerofl.sparse.sparsify import sparse_layers


class Flops(NamedTuple):
    """Floating-point operations for one training sample: of dense training and of SWAT."""

    dense: float
    sparse: float


def training_flops(experiment: Experiment, dataset: Dataset) -> Flops:
    """What one sample takes, forward and backward, in the convolutions and linear layers of the experiment's model.

    Each multiply-add is two operations, and each of the three products (forward, grad_input, grad_weight) takes one
    for every pair of weight and output position; the first layer needs no grad_input. In a sparse layer the first two
    take the layer's active weights only, the third its active activations (Eqs. 1 and 2). BatchNorm, biases and the
    search for the top K are not counted.
    """
    shape = tuple(dataset.train.images.shape[1:])
    with torch.device("meta"):
        model = build_model(experiment.model, len(dataset.classes), shape[0], experiment.width)
    sparse = {model.get_submodule(name): layer for name, layer in sparse_layers(empty_model(experiment, dataset))}
    dense_flops = sparse_flops = 0.0
    first = True

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal dense_flops, sparse_flops, first
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        product = 2.0 * output[0].numel() * layer.weight[0].numel()
        by_weight = 1 if first else 2  # forward and grad_input
        first = False
        dense_flops += product * (by_weight + 1)
        if (of := sparse.get(layer)) is not None:
            sparse_flops += product * (by_weight * (1 - of.sparsity) + 1 - of.activation_sparsity)
        else:
            sparse_flops += product * (by_weight + 1)

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    with torch.no_grad():
        model.eval()(torch.empty(1, *shape, device="meta"))
    for hook in hooks:
        hook.remove()
    return Flops(dense_flops, sparse_flops)
