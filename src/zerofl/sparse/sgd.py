"""SGD that never has the gradients of sparse layers' weights in memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from zerofl.sparse.in_backward import Applied, Scanned, register
from zerofl.sparse.powerpropagation import powered_step_
from zerofl.sparse.sparsify import sparse_layers

_KEPT = {"weights": "_weights", "scan_ahead": "scan_ahead", "powerpropagation": "powerpropagation"}
"""What a copy has beside torch.optim.SGD's state, and the attribute that it is."""


class SparseSGD(torch.optim.SGD):
    """`torch.optim.SGD` for a model with sparse layers, whose weights are updated in the backward pass.

    SWAT's gradient of a weight is dense, as large as the weight. On the native kernels each part of it is used for the
    weight's step as soon as it is computed, so it is neither written nor read; `step` does the rest. The arithmetic is
    torch.optim.SGD's, to the last bit where both use the processor's fused multiply-add. Learning-rate schedulers,
    `state_dict`, `zero_grad` and closures work as they do there.

    The rate is the one at the backward pass, which changes the weights even if no step() follows. What needs the
    whole gradient first cannot work, and is an error that says so: clipping, a gradient scaler, several backward
    passes before one `zero_grad()`, a layer that is used twice in a forward pass, another optimiser's step while
    this one is there. Where the weight has a hook, the model runs in `DistributedDataParallel`, or
    `torch.autograd.grad` asks for its gradient, it is computed as ever. So it is for layers on the reference or a
    GPU. Of several made for a weight, the last one takes its steps.

    Args:
        model: its parameters are optimised; make its layers sparse before.
        lr: the learning rate.
        momentum: of the velocity, without dampening.
        weight_decay: the L2 penalty.
        scan_ahead: look for a linear layer's next active weights in the pass that updates them, not in one more. The
            results are the same bits, and a large layer on a small batch takes less time; but between two steps nothing
            may write to the weight's memory in a way that autograd does not see, as through `.data` or
            `.detach().apply_`, NumPy, DLPack or shared memory, or as the collectives of torch.distributed do.
        powerpropagation: the exponent alpha, from 1 to 2. Above 1 the steps on the sparse layers' weights are those of
            Powerpropagation (`zerofl.sparse.powerpropagation`), with momentum and weight decay of v.

    Raises:
        ValueError: powerpropagation out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        *,
        scan_ahead: bool = False,
        powerpropagation: float = 1.0,
    ) -> None:
        if not 1 <= powerpropagation <= 2:
            raise ValueError(f"powerpropagation = {powerpropagation!r}: expected 1 (plain SGD) to 2")
        super().__init__(model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
        own = {id(parameter) for group in self.param_groups for parameter in group["params"]}
        weights = [layer.weight for _, layer in sparse_layers(model) if id(layer.weight) in own]
        self._take_over(weights, scan_ahead, powerpropagation)

    def _take_over(self, weights: list[Tensor], scan_ahead: bool, powerpropagation: float) -> None:
        self._weights, self.scan_ahead, self.scanned = weights, scan_ahead, dict[int, Scanned]()
        self.powerpropagation = powerpropagation
        for weight in weights:
            register(weight, self)

    def __getstate__(self) -> dict[str, Any]:
        """With the weights, so that a copy or a pickle of model and optimiser together is one that works."""
        return super().__getstate__() | {key: getattr(self, name) for key, name in _KEPT.items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy or a pickle, which have them; or of `load_state_dict`, which calls this with what it has read."""
        own = {key: value for key, value in state.items() if key not in _KEPT}
        super().__setstate__(own)  # type: ignore[no-untyped-call]
        if "weights" in state:
            self._take_over(**{key: state[key] for key in _KEPT})

    def sgd_of(self, weight: Tensor) -> tuple[Tensor | None, float, float, float] | None:
        """See `zerofl.sparse.in_backward.Optimizer`."""
        group = next((group for group in self.param_groups if any(p is weight for p in group["params"])), None)
        if group is None or group["nesterov"] or group["maximize"] or group["dampening"] or group["differentiable"]:
            return None
        velocity = None
        if group["momentum"]:
            velocity = self.state[weight].get("momentum_buffer")
            if velocity is None:
                velocity = self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        return velocity, float(group["lr"]), group["momentum"], group["weight_decay"]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the other parameters. `closure` computes the loss and its gradients first, if it is given.

        Raises:
            RuntimeError: another SparseSGD took the step on a weight, or it is the second time since the backward pass.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        applied = [p for group in self.param_groups for p in group["params"] if isinstance(p.grad, Applied)]
        steps = [parameter.grad for parameter in applied]
        for parameter, step in zip(applied, steps, strict=True):
            if step.by() is not self:
                raise RuntimeError(
                    f"step() of a SparseSGD, where another took the step on a weight {tuple(parameter.shape)} in the "
                    "backward pass: the one that was made last takes it. Call zero_grad(), and use that one alone"
                )
            if step.is_stepped:
                raise RuntimeError(
                    f"step() of a SparseSGD a second time since the backward pass, in which the step on a weight "
                    f"{tuple(parameter.shape)} was taken once: call zero_grad() and a backward pass before each step()"
                )
        for step in steps:
            step.is_stepped = True
        has_gradient = [w for w in self._weights if w.grad is not None and not isinstance(w.grad, Applied)]
        powered = has_gradient if self.powerpropagation != 1 else []
        for weight in powered:
            self._powered_step(weight)
        done = [(parameter, parameter.grad) for parameter in (*applied, *powered)]
        for parameter, _ in done:
            parameter.grad = None
        step = torch.optim.SGD.step
        if getattr(step, "hooked", False):  # by a torch.optim.SGD made before: hooks of steps would be called twice
            step = step.__wrapped__  # type: ignore[attr-defined]
        try:
            step(self)
        finally:
            for parameter, gradient in done:  # until zero_grad
                parameter.grad = gradient
        return loss

    def _powered_step(self, weight: Tensor) -> None:
        settings = self.sgd_of(weight)
        if settings is None:
            raise RuntimeError(
                "powerpropagation knows lr, momentum and weight_decay: leave nesterov, maximize, dampening and "
                "differentiable out of the parameter groups"
            )
        velocity, lr, momentum, weight_decay = settings
        assert weight.grad is not None
        powered_step_(weight, weight.grad, velocity, lr, momentum, weight_decay, self.powerpropagation)
