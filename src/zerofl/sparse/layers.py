"""Sparse layers, which `zerofl.sparsify_` makes of a model's dense ones."""

import inspect
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zerofl.sparse import kernels, layout, swat
from zerofl.sparse.dispatch import is_exporting, native, takes
from zerofl.sparse.topk import count_active, count_top_k, top_k, top_k_threshold

Backend = Literal["auto", "native", "reference"]

_BAKE = "call zerofl.bake_(model), which makes its sparse layers plain ones with their top-k weights"


def _refuse_export() -> None:
    raise RuntimeError(f"sparse layers cannot be traced or exported; first {_BAKE}")


# Where torch.export traces the model's code itself, it tells this reason instead of the error.
if "reason" in inspect.signature(torch.compiler.disable).parameters:
    _refuse_export = torch.compiler.disable(  # type: ignore[no-untyped-call]
        _refuse_export, reason=f"sparse layers: first {_BAKE}"
    )


class TopKLayer:
    """What a sparse layer adds to its dense one: plain attributes, so that the state_dict keys stay the same."""

    weight: Tensor
    training: bool
    sparsity: float
    activation_sparsity: float
    topk_period: int
    backend: Backend
    training_steps: int
    bias: Any  # Tensor | None, which nn.Conv2d and nn.Linear declare each in its way
    weight_threshold: Tensor | float | None
    activation_threshold: Tensor | float | None
    active_weights: Tensor | int | None  # of the last forward pass in training; a tensor, lest it waits for a GPU

    def _takes_shape(self, input: Tensor) -> bool:
        raise NotImplementedError

    def _check(self, input: Any) -> None:
        """Raise what the dense layer raises for this input, if anything, before anything of the layer has changed.

        Raises:
            RuntimeError: besides, the model is being traced or exported.
        """
        if is_exporting():
            _refuse_export()
        if not (_is_like(input, self.weight) and self._takes_shape(input)):
            self._ask_dense(input)

    def __prepare_scriptable__(self) -> None:  # torch.jit.script calls it
        _refuse_export()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _ask_dense(self, input: Any) -> None:
        with torch.no_grad():
            super().forward(input)  # type: ignore[misc]
        if not isinstance(input, Tensor) or input.layout != torch.strided:
            kind = input.layout if isinstance(input, Tensor) else type(input).__name__
            raise TypeError(
                f"a sparse layer takes a dense torch.Tensor, got {kind}; of a sparse tensor give its .to_dense(), and "
                f"before tracing {_BAKE}"
            )

    def _is_fresh(self) -> bool:
        """Whether this call takes its thresholds anew; counts the training steps.

        In training that is every `topk_period` steps; outside training always.

        Raises:
            RuntimeError: gradient checkpointing with a period above 1. The backward pass then repeats this call, and
                nothing tells which of the earlier ones it repeats, so neither which thresholds that had.
        """
        if not (self.training and torch.is_grad_enabled() and self.weight.requires_grad):
            return True
        if torch._C._current_graph_task_id() != -1:  # within a backward pass
            if self.topk_period > 1:
                raise RuntimeError(
                    f"topk_period = {self.topk_period} with gradient checkpointing: the repeated forward pass would "
                    "take other thresholds than the first one did. Call sparsify_ with topk_period=1, or leave this "
                    "layer out of torch.utils.checkpoint"
                )
            return True  # the weights are those of the first pass, and so are the thresholds; no step to count
        fresh = self.weight_threshold is None or self.training_steps % self.topk_period == 0
        self.training_steps += 1
        return fresh

    # Data-dependent, and exact arithmetic on sizes: torch.compile leaves the graph for it and resumes behind it.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _thresholds(self, input: Tensor) -> tuple[Tensor, Tensor | None]:
        """This call's thresholds for the weight and, where a weight gradient may be asked for, the input.

        The input's K counts the whole batch tensor.
        """
        counts = input.numel() > 0  # an empty batch is no step, and has no threshold for the next one
        if counts and not self._is_fresh():
            self.active_weights = count_active(self.weight, self.weight_threshold)  # type: ignore[arg-type]
            return self.weight_threshold, self.activation_threshold  # type: ignore[return-value]
        weight_threshold, active_weights = top_k(self.weight, count_top_k(self.weight.numel(), self.sparsity))
        activation_threshold = None
        if torch.is_grad_enabled() and self.weight.requires_grad:
            activation_threshold = top_k_threshold(input, count_top_k(input.numel(), self.activation_sparsity))
            if self.training and counts:
                self.weight_threshold, self.activation_threshold = weight_threshold, activation_threshold
                self.active_weights = active_weights
        return weight_threshold, activation_threshold

    def choices(self, input: Tensor, unpadded: Tensor | None = None) -> tuple[Any, Any]:
        """Which of the weight's and the input's entries the kernels take in this call; counts the training steps."""
        k_of_weight = count_top_k(self.weight.numel(), self.sparsity)
        k_of_input = count_top_k(input.numel(), self.activation_sparsity)
        before = self.weight_threshold, self.activation_threshold
        of_weight, of_input = (0.0 if threshold is None else float(threshold) for threshold in before)
        if not self._is_fresh():
            return native.AtLeast(of_weight, k_of_weight), native.AtLeast(of_input, k_of_input)
        if unpadded is not None:  # K counts the input before its padding
            threshold = top_k_threshold(unpadded, count_top_k(unpadded.numel(), self.activation_sparsity))
            return native.TopK(k_of_weight, of_weight), native.AtLeast(threshold.item())
        return native.TopK(k_of_weight, of_weight), native.TopK(k_of_input, of_input)

    def remember(self, chosen: kernels.Chosen) -> None:
        """Keep what a call in training chose, for the next one and for `realised_sparsity`."""
        if self.training and chosen.input_threshold is not None:
            self.weight_threshold, self.activation_threshold = chosen.weight_threshold, chosen.input_threshold
            self.active_weights = chosen.active_weights

    def _is_native(self, *tensors: Tensor | None, supported: str | None = None) -> bool:
        """Whether this call runs on the native kernels; `supported` names what they lack, if anything.

        Raises:
            RuntimeError: backend="native" was asked for, and they cannot do this.
        """
        if self.backend == "reference":
            return False
        if supported is None and takes(*tensors):
            return True
        empty = any(t is not None and t.numel() == 0 for t in tensors)  # of which the kernels have nothing to compute
        if self.backend == "native" and not empty:
            raise RuntimeError(
                "backend='native' does float32 tensors on the CPU, outside autocast and with groups=1; "
                f"got {supported or _describe(tensors)}; use backend='auto' to fall back to the reference"
            )
        return False

    def extra_repr(self) -> str:
        """The dense layer's, and the sparsity."""
        return (
            f"{super().extra_repr()}, sparsity={self.sparsity}, "  # type: ignore[misc]
            f"activation_sparsity={self.activation_sparsity}, topk_period={self.topk_period}, backend={self.backend!r}"
        )


class SparseConv2d(TopKLayer, nn.Conv2d):
    """`nn.Conv2d` trained with SWAT: the paper's layer l (§3.1). Made by `sparsify_`."""

    def forward(self, input: Tensor, keep: bool = False) -> Any:
        """Input [N, C, H, W] or [C, H, W] -> output [N, O, H', W'] or [O, H', W'].

        With `keep`, which is for `blocks.fork`, returns every stride-th position of the input too.
        """
        self._check(input)
        if input.dim() == 3:
            outputs = self.forward(input.unsqueeze(0), keep)
            return tuple(x.squeeze(0) for x in outputs) if keep else outputs.squeeze(0)
        original, padding = input, self.padding
        if self.padding_mode != "zeros" or isinstance(padding, str):
            # As nn.Conv2d does, which keeps this list for F.pad; "same" and "valid" become explicit borders.
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            input, padding = F.pad(input, self._reversed_padding_repeated_twice, mode=mode), (0, 0)
        if self._is_native(
            input, self.weight, self.bias, supported=None if self.groups == 1 else f"groups={self.groups}"
        ):
            output, sampled = self._native(input, padding, None if input is original else original)
            if keep and input is original:
                return output, sampled
        else:
            weight_threshold, activation_threshold = self._thresholds(original)
            output = swat.Conv2d.apply(  # type: ignore[no-untyped-call]
                input,
                self.weight,
                self.bias,
                weight_threshold,
                activation_threshold,
                self.stride,
                padding,
                self.dilation,
                self.groups,
            )
        return (output, original[:, :, :: self.stride[0], :: self.stride[1]]) if keep else output

    def _takes_shape(self, input: Tensor) -> bool:
        return layout.takes_shape(self, input)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _native(self, input: Tensor, padding: Sequence[int], unpadded: Tensor | None) -> tuple[Tensor, Tensor]:
        """Output and samples."""
        input = kernels.batch_first(input.permute(1, 2, 3, 0).contiguous())  # once, and not for each use
        choices = self.choices(input, unpadded)
        output, samples, chosen = kernels.conv2d(
            input, self.weight, self.bias, *choices, self.stride, padding, self.dilation
        )
        self.remember(chosen)
        return output, samples


class SparseLinear(TopKLayer, nn.Linear):
    """`nn.Linear` trained with SWAT. Made by `sparsify_`."""

    def forward(self, input: Tensor) -> Tensor:
        """Input [..., I] -> output [..., O]."""
        self._check(input)
        if self._is_native(input, self.weight, self.bias):
            return self._native(input)  # type: ignore[no-any-return]
        return swat.Linear.apply(  # type: ignore[no-any-return,no-untyped-call]
            input, self.weight, self.bias, *self._thresholds(input)
        )

    def _takes_shape(self, input: Tensor) -> bool:
        return input.shape[-1:] == (self.in_features,)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _native(self, input: Tensor) -> Tensor:
        rows = input.reshape(-1, self.in_features)
        output, chosen = kernels.linear(rows, self.weight, self.bias, *self.choices(rows))
        self.remember(chosen)
        return output.view(*input.shape[:-1], self.out_features)


def _is_like(input: Any, weight: Tensor) -> bool:
    """Whether `input` is a tensor on the weight's device and of its type, or of one that autocast casts to the same."""
    if not isinstance(input, Tensor) or input.layout != torch.strided or input.device != weight.device:
        return False
    return input.dtype == weight.dtype or (
        torch.is_autocast_enabled(input.device.type) and {input.dtype, weight.dtype} <= _AUTOCAST
    )


_AUTOCAST = {torch.float32, torch.float16, torch.bfloat16}


def _describe(tensors: Iterable[Tensor | None]) -> str:
    return ", ".join(f"{t.dtype} {tuple(t.shape)} on {t.device}" for t in tensors if t is not None)
