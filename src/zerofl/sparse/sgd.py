"""SGD that never has the gradients of sparse layers' weights in memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from zerofl.sparse.in_backward import Applied, Scanned, register
from zerofl.sparse.sparsify import sparse_layers


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
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        *,
        scan_ahead: bool = False,
    ) -> None:
        super().__init__(model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
        own = {id(parameter) for group in self.param_groups for parameter in group["params"]}
        self._take_over([layer.weight for _, layer in sparse_layers(model) if id(layer.weight) in own], scan_ahead)

    def _take_over(self, weights: list[Tensor], scan_ahead: bool) -> None:
        self._weights, self.scan_ahead, self.scanned = weights, scan_ahead, dict[int, Scanned]()
        for weight in weights:
            register(weight, self)

    def __getstate__(self) -> dict[str, Any]:
        """With the weights, so that a copy or a pickle of model and optimiser together is one that works."""
        return super().__getstate__() | {"weights": self._weights, "scan_ahead": self.scan_ahead}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy or a pickle, which have them; or of `load_state_dict`, which calls this with what it has read."""
        own = {key: value for key, value in state.items() if key not in ("weights", "scan_ahead")}
        super().__setstate__(own)  # type: ignore[no-untyped-call]
        if "weights" in state:
            self._take_over(state["weights"], state["scan_ahead"])

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
        for parameter in applied:
            parameter.grad = None
        super().step()
        for parameter, step in zip(applied, steps, strict=True):  # until zero_grad, as a gradient would be
            parameter.grad, step.is_stepped = step, True
        return loss
