"""Weights whose step of SGD is taken within the backward pass, where their gradient is computed: which, and when not.

`zerofl.sparse.sgd.SparseSGD` registers them; the kernels' backward pass asks `step_on`.
"""

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn.parallel import DistributedDataParallel

from zerofl.sparse.dispatch import native, takes


class Applied(torch.Tensor):
    """In the place of a gradient that is nowhere in memory, because the step with it was taken. Nothing can use it."""

    by: Any  # a reference to the optimiser
    is_stepped: bool  # whether its step() took the other parameters' steps since

    @staticmethod
    def __new__(
        cls, weight: Tensor, by: Any, is_stepped: bool = False, dtype: Any = None, device: Any = None
    ) -> "Applied":
        """Of the weight's shape, type and device unless they are given, without memory."""
        made: Applied = torch.Tensor._make_wrapper_subclass(
            cls, weight.shape, dtype=dtype or weight.dtype, device=device or weight.device
        )
        made.by, made.is_stepped = by, is_stepped
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"<the step with this gradient of {tuple(self.shape)} was taken in the backward pass>"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(f"{self!r}: it cannot be saved. Call zero_grad() first")

    def share_memory_(self) -> "Applied":
        """With its model; there is nothing to share."""
        return self

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in _MOVES:  # with its model
            kwargs = kwargs or {}
            return Applied(args[0], args[0].by, args[0].is_stepped, kwargs.get("dtype"), kwargs.get("device"))
        raise RuntimeError(
            f"{func.__name__.partition('.')[0]} of the gradient of a sparse layer's weight: SparseSGD took the step "
            "with it in the backward pass, so there is none to clip, scale or add to, for a hook on its AccumulateGrad "
            "to average, or for another optimiser's step. Call zero_grad() (with set_to_none, its default) before each "
            "backward pass and use a layer once in it; or take torch.optim.SGD, which has all gradients, and delete "
            "the SparseSGD, which takes its steps as long as it is there"
        )


_MOVES = (
    torch.ops.aten._to_copy.default,
    torch.ops.aten.detach.default,
    torch.ops.aten.clone.default,
    torch.ops.aten.empty_like.default,
)


class Scanned(NamedTuple):
    """What a scan found in a weight, and the weight as it was then."""

    weight: Tensor
    version: int
    memory: Tensor  # which nothing else can get as long as this is here, so that its address tells
    candidates: Any


class Optimizer(Protocol):
    """What is asked of the optimiser of a registered weight."""

    scan_ahead: bool
    """Whether a linear layer's weight is scanned for the next step in the same pass."""

    powerpropagation: float
    """The exponent, see `zerofl.sparse.powerpropagation`; 1 is SGD on the weight."""

    scanned: dict[int, Scanned]
    """What was found, by the weight's id."""

    def sgd_of(self, weight: Tensor) -> tuple[Tensor | None, float, float, float] | None:
        """Velocity, rate, momentum and weight decay of a step on it; None if it must be another kind of step."""


_optimizers: dict[int, weakref.ref[Optimizer]] = {}
"""By the weight's id, which no other tensor gets while the optimiser has the weight. torch.utils.swap_tensors takes no
tensor to which there are weak references."""


def register(weight: Tensor, optimizer: Optimizer) -> None:
    """Have the steps on a weight taken in its backward pass, while there is the optimiser, which has the weight."""
    key = id(weight)

    # The dictionary as an argument: when Python ends, this module may lose its names before the optimiser goes.
    def forget(reference: weakref.ref[Optimizer], optimizers: dict[int, Any] = _optimizers) -> None:
        if optimizers.get(key) is reference:
            del optimizers[key]

    _optimizers[key] = weakref.ref(optimizer, forget)


def _optimizer_of(weight: Tensor) -> Optimizer | None:
    reference = _optimizers.get(id(weight))
    return reference() if reference else None


def is_in_ddp() -> bool:
    """Whether this forward pass is DistributedDataParallel's.

    It averages the gradients by hooks on their accumulation, which nothing else can see.
    """
    return DistributedDataParallel._active_ddp_module is not None


def step_on(weight: Tensor, edges: Sequence[Any], in_ddp: bool) -> Any:
    """The kernels' step on a layer's weight, of which this is the backward pass; None if its gradient is asked for.

    It is where the weight is not registered, is no contiguous leaf, has a hook that wants to see the gradient, is
    not what the backward pass is about (`torch.autograd.grad`), the forward pass was in DistributedDataParallel, or
    the optimiser is to do more than SGD or has a velocity of another type or order. `edges` are the backward node's
    next functions, the weight's at 1.

    Raises:
        RuntimeError: the weight has a gradient, or had its step, since the last zero_grad().
    """
    optimizer = _optimizer_of(weight)
    if optimizer is None or in_ddp or not weight.is_contiguous():
        return None
    if weight._backward_hooks or weight._post_accumulate_grad_hooks:
        return None
    if getattr(edges[1][0], "variable", None) is not weight or not _accumulates(edges[1][0]):
        return None
    settings = optimizer.sgd_of(weight)
    if settings is None:
        return None
    velocity = settings[0]
    if velocity is not None and not (velocity.is_contiguous() and takes(velocity)):
        return None
    if weight.grad is not None:
        raise RuntimeError(
            f"a second gradient of a sparse layer's weight {tuple(weight.shape)} before zero_grad(): SparseSGD takes "
            "the step in the backward pass, so gradients are not accumulated and a layer is used once. Call "
            "zero_grad() before each backward pass, or take torch.optim.SGD"
        )
    scans = optimizer.scan_ahead and weight.dim() == 2
    candidates = native.Candidates() if scans else None
    return native.Sgd(weight.detach(), *settings, candidates, optimizer.powerpropagation)


def taken(weight: Tensor, sgd: Any) -> None:
    """Say that the step was taken: in `grad`, and to autograd, to which other uses of the old weight are errors."""
    increment_version(weight)
    weight.grad = Applied(weight, _optimizers[id(weight)])
    optimizer = _optimizer_of(weight)
    if optimizer is not None and sgd.candidates is not None:
        optimizer.scanned[id(weight)] = Scanned(weight, weight._version, weight.detach(), sgd.candidates)


def candidates_of(weight: Tensor) -> Any:
    """What the scan in the last step on a linear layer's weight found, once; None without one, or if it changed since.

    A change in place that autograd does not see is not seen.
    """
    optimizer = _optimizer_of(weight)
    found = optimizer.scanned.pop(id(weight), None) if optimizer else None
    if found is None or found.weight is not weight or found.version != weight._version:
        return None
    return found.candidates if found.memory.data_ptr() == weight.data_ptr() else None


def _accumulates(node: Any) -> bool:
    """Whether this backward pass leads to the gradient of a leaf."""
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # torch.autograd.grad of the leaf itself
        return False
