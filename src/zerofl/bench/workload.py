"""What `zerofl bench step` and `layers` measure: a training step of a model, or of one of its sparse layers alone."""

import copy
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zerofl.models import build_model
from zerofl.sparse import kernels
from zerofl.sparse.layers import Backend
from zerofl.sparse.sgd import SparseSGD
from zerofl.sparse.sparsify import sparsify_

try:
    import sparseprop.modules as sparseprop
except ImportError:
    sparseprop = None

MODELS = {"resnet18": (10, 3, 32), "leaf_cnn": (62, 1, 28)}  # classes, channels, height and width of the images


class Workload(NamedTuple):
    """What a step trains: a model, or one of its sparse layers alone, with an output gradient given."""

    model: str
    batch_size: int
    layer: str = ""


class Step(NamedTuple):
    """A training step that can be repeated, in its parts."""

    module: nn.Module
    input: Tensor
    zero_grad: Callable[[], None]
    backward: Callable[[Tensor], None]
    optimise: Callable[[], None]

    def gradients(self) -> Tensor:
        """All but the update; returns the output."""
        self.zero_grad()
        output: Tensor = self.module(self.input)
        self.backward(output)
        return output

    def run(self) -> None:
        """The whole step."""
        self.gradients()
        self.optimise()


def alike_layers(model: str, batch_size: int) -> list[list[str]]:
    """The names of the sparse layers, those of the same shape together."""
    alike: dict[str, list[str]] = defaultdict(list)
    for name, shape in _input_shapes(model, batch_size).items():
        alike[f"{_dense_model(model).get_submodule(name)} {shape}"].append(name)
    return list(alike.values())


def has_normalisation(model: str) -> bool:
    """Whether the model normalises anything, so that `storage` means something."""
    return any(isinstance(module, nn.BatchNorm2d) for module in _dense_model(model).modules())


def _input_shapes(model: str, batch_size: int) -> dict[str, torch.Size]:
    """The shape of each sparse layer's input, by the layer's name."""
    shapes: dict[str, torch.Size] = {}
    module = _dense_model(model)
    for name in module.sparse_layers:  # type: ignore[union-attr]
        layer = module.get_submodule(name)
        layer.register_forward_hook(lambda _, inputs, __, name=name: shapes.update({name: inputs[0].shape}))
    _, channels, side = MODELS[model]
    with torch.no_grad():
        module.eval()(torch.zeros(batch_size, channels, side, side))
    return shapes


def _dense_model(model: str) -> nn.Module:
    classes, channels, _ = MODELS[model]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_model(model, classes, channels, width=64)


def make_step(
    workload: Workload,
    sparsity: float | None,
    backend: Backend = "auto",
    memory_format: torch.memory_format = torch.channels_last,
    storage: str = "float32",
    compiled: bool = False,
    autocast: bool = False,
) -> Step:
    """A step of the dense workload (`sparsity` None) or a sparse one, which stores what it normalises as `storage`.

    The dense one is in PyTorch's `memory_format`, `compiled` by torch.compile or not, in float32 or, with `autocast`,
    bfloat16 where PyTorch takes it.
    """
    generator = torch.Generator().manual_seed(0)
    classes, channels, side = MODELS[workload.model]
    module = _dense_model(workload.model)
    if workload.layer:
        layer, shape = module.get_submodule(workload.layer), _input_shapes(*workload[:2])[workload.layer]
        module = nn.Sequential(layer)
        input = torch.randn(shape, generator=generator).relu()
    else:
        input = torch.rand(workload.batch_size, channels, side, side, generator=generator)
    if sparsity is None:
        module = module.to(memory_format=memory_format)  # type: ignore[call-overload]
    else:
        sparsify_(module, sparsity, layers=["0"] if workload.layer else None, backend=backend, storage=storage)

    def laid_out(x: Tensor) -> Tensor:
        """As the layer before or behind would hand it over."""
        if x.dim() != 4:
            return x
        if sparsity is None:
            return x.contiguous(memory_format=memory_format)
        return kernels.batch_first(kernels.batch_innermost(x))

    if workload.layer:
        grad_output = laid_out(torch.randn(module(input).shape, generator=generator))
        input = laid_out(input).requires_grad_()

        def zero_grad() -> None:
            module.zero_grad()
            input.grad = None

        return Step(module, input, zero_grad, lambda output: torch.autograd.backward(output, grad_output), lambda: None)

    labels = torch.randint(0, classes, (workload.batch_size,), generator=generator)
    if sparsity is None:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    else:
        optimizer = SparseSGD(module, lr=0.01, scan_ahead=True)

    if autocast:
        module = _Autocast(module)
    if compiled:
        module = torch.compile(module)  # type: ignore[assignment]
    return Step(
        module,
        laid_out(input) if sparsity is None else input,
        optimizer.zero_grad,
        lambda output: torch.autograd.backward(F.cross_entropy(output, labels)),
        optimizer.step,
    )


class _Autocast(nn.Module):
    """A module whose products are in bfloat16, and whose output is float32 again."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y: Tensor = self.module(x)
        return y.float()


def sparseprop_runs(workload: Workload, sparsity: float) -> list[Callable[[], object]]:
    """Forward and backward of a layer on SparseProp's kernels, vectorised over the width and over the batch."""
    if sparseprop is None or not workload.layer:
        return []
    return [_sparseprop_run(workload, sparsity, over_width) for over_width in (False, True)]


def _sparseprop_run(workload: Workload, sparsity: float, over_width: bool) -> Callable[[], object]:
    dense = copy.deepcopy(make_step(workload, None))
    layer: Any = dense.module.get_submodule("0")
    threshold = kernels.top_k_threshold(
        layer.weight.detach().contiguous(), round((1 - sparsity) * layer.weight.numel())
    )
    layer.weight.data = torch.where(layer.weight.abs() < threshold, 0.0, layer.weight).detach().contiguous()
    if isinstance(layer, nn.Linear):
        sparse = sparseprop.SparseLinear.from_dense(layer)
    else:
        sparse = sparseprop.SparseConv2d.from_dense(layer, vectorizing_over_on=over_width)
    input = dense.input.detach().contiguous()
    grad_output = torch.randn(dense.module(dense.input).shape)
    if not over_width and input.dim() == 4:  # it takes these without moving them
        input, grad_output = (kernels.batch_first(kernels.batch_innermost(x)) for x in (input, grad_output))
    input.requires_grad_()

    def run() -> None:
        sparse.zero_grad()
        input.grad = None
        sparse(input).backward(grad_output)

    return run
