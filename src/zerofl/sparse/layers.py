"""Sparse layers, and `sparsify_`, which turns a dense model's layers into them in place."""

import inspect
import logging
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zerofl.sparse import kernels, layout, swat
from zerofl.sparse.default_layers import default_by_shape
from zerofl.sparse.topk import active, count_top_k, keep_active, top_k_threshold

Backend = Literal["auto", "native", "reference"]
_log = logging.getLogger(__name__)


_BAKE = "call zerofl.bake_(model), which makes its sparse layers plain ones with their top-k weights"


def _refuse_export() -> None:
    raise RuntimeError(f"sparse layers cannot be traced or exported; first {_BAKE}")


# Where torch.export traces the model's code itself, it tells this reason instead of the error.
if "reason" in inspect.signature(torch.compiler.disable).parameters:
    _refuse_export = torch.compiler.disable(  # type: ignore[no-untyped-call]
        _refuse_export, reason=f"sparse layers: first {_BAKE}"
    )


class _TopK:
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
        if kernels.is_exporting():
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
            self.active_weights = active(self.weight, self.weight_threshold).count_nonzero()  # type: ignore[arg-type]
            return self.weight_threshold, self.activation_threshold  # type: ignore[return-value]
        weight_threshold = top_k_threshold(self.weight, count_top_k(self.weight.numel(), self.sparsity))
        activation_threshold = None
        if torch.is_grad_enabled() and self.weight.requires_grad:
            activation_threshold = top_k_threshold(input, count_top_k(input.numel(), self.activation_sparsity))
            if self.training and counts:
                self.weight_threshold, self.activation_threshold = weight_threshold, activation_threshold
                self.active_weights = active(self.weight, weight_threshold).count_nonzero()
        return weight_threshold, activation_threshold

    def _convolve(
        self,
        input: Tensor,
        weight: Tensor,
        stride: Sequence[int] = (1, 1),
        padding: Sequence[int] = (0, 0),
        dilation: Sequence[int] = (1, 1),
        unpadded: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The layer on the kernels: input [N, C, H, W], weight [O, C, kH, kW] -> [N, O, H', W'], and input samples."""
        input = kernels.batch_first(input.permute(1, 2, 3, 0).contiguous())  # once, and not for each use
        exact = not self._is_fresh()
        thresholds = [0.0 if t is None else float(t) for t in (self.weight_threshold, self.activation_threshold)]
        of_weight = kernels.Choice(count_top_k(weight.numel(), self.sparsity), thresholds[0], exact)
        if unpadded is not None and not exact:  # K counts the input before its padding
            threshold = top_k_threshold(unpadded, count_top_k(unpadded.numel(), self.activation_sparsity))
            of_input = kernels.Choice(0, threshold.item(), exact=True)
        else:
            of_input = kernels.Choice(count_top_k(input.numel(), self.activation_sparsity), thresholds[1], exact)
        output, sampled, weight_threshold, input_threshold, active_weights = kernels.conv2d(
            input, weight, self.bias, of_weight, of_input, stride, padding, dilation
        )
        if self.training and input_threshold is not None:
            self.weight_threshold, self.activation_threshold = weight_threshold, input_threshold
            self.active_weights = active_weights
        return output, sampled

    def _is_native(self, *tensors: Tensor | None, supported: str | None = None) -> bool:
        """Whether this call runs on the native kernels; `supported` names what they lack, if anything.

        Raises:
            RuntimeError: backend="native" was asked for, and they cannot do this.
        """
        if self.backend == "reference":
            return False
        if supported is None and kernels.takes(*tensors):
            return True
        empty = any(t is not None and t.numel() == 0 for t in tensors)  # of which the kernels have nothing to compute
        if self.backend == "native" and not empty:
            raise RuntimeError(
                "backend='native' does float32 tensors on the CPU, outside autocast and with groups=1; "
                f"got {supported or _describe(tensors)}; use backend='auto' to fall back to the reference"
            )
        return False

    def _sparsity_repr(self) -> str:
        return (
            f"sparsity={self.sparsity}, activation_sparsity={self.activation_sparsity}, "
            f"topk_period={self.topk_period}, backend={self.backend!r}"
        )


class SparseConv2d(_TopK, nn.Conv2d):
    """`nn.Conv2d` trained with SWAT: the paper's layer l (§3.1). Made by `sparsify_`."""

    can_keep_input = True  # for `innermost.fork`

    def forward(self, input: Tensor, keep: bool = False) -> Any:
        """Input [N, C, H, W] or [C, H, W] -> output [N, O, H', W'] or [O, H', W'].

        With `keep`, which is for `innermost.fork`, returns every stride-th position of the input too.
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
        return self._convolve(input, self.weight, self.stride, padding, self.dilation, unpadded)

    def extra_repr(self) -> str:
        """The dense layer's, and the sparsity."""
        return f"{super().extra_repr()}, {self._sparsity_repr()}"  # type: ignore[no-untyped-call]


class SparseLinear(_TopK, nn.Linear):
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
        # A 1x1 convolution of images of one position: [rows, I] lies batch innermost as [I, rows].
        rows = input.reshape(-1, self.in_features, 1, 1)
        output, _ = self._convolve(rows, self.weight[:, :, None, None])
        # Laid out as nn.Linear's, so that .view() works behind it; of a few numbers this copy takes no time.
        return output.flatten(1).contiguous().view(*input.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """The dense layer's, and the sparsity."""
        return f"{super().extra_repr()}, {self._sparsity_repr()}"


# By exact type: a subclass of nn.Conv2d has a forward of its own that must not be lost.
_SPARSE_CLASS: dict[type[nn.Module], type[SparseConv2d] | type[SparseLinear]] = {
    nn.Conv2d: SparseConv2d,
    nn.Linear: SparseLinear,
    layout.Conv2d: SparseConv2d,
    SparseConv2d: SparseConv2d,
    SparseLinear: SparseLinear,
}


_PLAIN_CLASS: dict[type[nn.Module], type[nn.Module]] = {
    **{double: plain for plain, double in layout.INNERMOST.items()},
    SparseConv2d: nn.Conv2d,
    SparseLinear: nn.Linear,
}
_SETTINGS = (
    "sparsity", "activation_sparsity", "topk_period", "backend", "training_steps", "weight_threshold",
    "activation_threshold", "active_weights",
)  # fmt: skip
_FUSED = "zerofl_activation_relu_or_gelu"  # where a transformer layer's own is kept


def sparsify_(
    model: nn.Module,
    sparsity: float = 0.95,
    *,
    activation_sparsity: float | None = None,
    layers: Iterable[str] | None = None,
    topk_period: int = 1,
    backend: Backend = "auto",
) -> list[str]:
    """Make layers of `model` train and evaluate with their top-k weights (SWAT, §3.1), in place.

    The parameters, their `state_dict` keys, hooks and devices stay; an optimiser made before still holds. Calling it
    again changes the settings. With sparsity 0 the results are the dense model's, gradients up to rounding.
    `torch.compile` works; `torch.func` transforms do not. Give it a whole `nn.TransformerEncoderLayer`, not a part: its
    fused evaluation would read the part's dense weight.

    Args:
        model: any module with `nn.Conv2d` or `nn.Linear` layers.
        sparsity: fraction of each layer's weights that is zero in a forward pass, in [0, 1).
        activation_sparsity: the same of the layer's input in the weight gradient; `sparsity` unless given.
        layers: qualified names of the layers to swap. Default: `model.sparse_layers` where the model names them (those
            of `zerofl.models` name the paper's), else every linear but the last and every convolution above 1x1 but the
            first; in a model with depthwise convolutions not these but the 1x1 ones (`default_by_shape` has the rule);
            and no layer whose weight another module uses. It warns if these have less than half of the parameters.
        topk_period: forward passes in training between two computations of a layer's thresholds. Above 1 the sparsity
            drifts in between (see `realised_sparsity`), and gradient checkpointing is refused: a pass that the backward
            pass repeats could not have the thresholds of the first one.
        backend: "native" computes with the non-zeros only, on the CPU in float32; "reference" with masks in plain
            PyTorch, anywhere; "auto" is native where it can be. Both give the same up to rounding. With the native
            kernels, the model's plain `nn.Conv2d`, `nn.BatchNorm2d` and `nn.MaxPool2d` become those of
            `zerofl.sparse.layout` if a convolution was made sparse: the same layers, without moving data in between.
            Their outputs then lie in memory with the batch innermost, in whatever memory format the input or the model
            is: behind them `.view()` of several dimensions at once fails, `.flatten()` and `.reshape()` work.

    A weight that several modules share stays one parameter. A layer that is named here takes the top-k part of it, a
    module that is not, such as an embedding, all of it; the gradient is the sum of both.

    Returns:
        The names of the swapped layers, in the model's order.

    Raises:
        ValueError: a sparsity or period out of range, a name that is not a convolution or linear of the model or has
            complex weights, or no layer to swap.
    """
    activation_sparsity = sparsity if activation_sparsity is None else activation_sparsity
    for argument, value in (("sparsity", sparsity), ("activation_sparsity", activation_sparsity)):
        if not isinstance(value, (int, float)) or not 0 <= value < 1:  # type: ignore[redundant-expr]
            raise ValueError(f"{argument} = {value}: expected a fraction of zeros in [0, 1), for example 0.95")
    if not isinstance(topk_period, int) or topk_period < 1:  # type: ignore[redundant-expr]
        raise ValueError(f"topk_period = {topk_period}: expected a number of forward passes, 1 or more")
    if backend not in ("auto", "native", "reference"):
        raise ValueError(f"backend = {backend!r}: expected 'auto', 'native' or 'reference'")
    if backend == "native" and kernels.UNAVAILABLE:
        raise ValueError(f"backend = 'native': the native kernels are not installed ({kernels.UNAVAILABLE})")
    if isinstance(layers, str):
        raise ValueError(f"layers = {layers!r}: expected a list of names; did you mean [{layers!r}]?")

    modules = dict(model.named_modules())
    names = list(_default_layers(model) if layers is None else layers)
    for name in names:
        if name not in modules:
            candidates = [n for n, m in modules.items() if type(m) in _SPARSE_CLASS]
            raise ValueError(f"layer {name!r} is not in the model; its convolutions and linears are {candidates}")
        if type(modules[name]) not in _SPARSE_CLASS:
            raise ValueError(
                f"layer {name!r} is a {type(modules[name]).__name__}; only nn.Conv2d and nn.Linear themselves can be "
                "made sparse (a subclass has a forward of its own)"
            )
        if not modules[name].weight.is_floating_point():
            raise ValueError(
                f"layer {name!r} has weights of {modules[name].weight.dtype}; only real ones can be made sparse"
            )
    if not names:
        raise ValueError("no layer to make sparse: name them with layers=[...]")

    names = [name for name in modules if name in set(names)]
    for name in names:
        layer = modules[name]
        # Re-classing in place, as torch.nn.utils.parametrize does, keeps the module's identity: hooks, parameters held
        # by an optimiser and modules used in two places all stay as they were.
        layer.__class__ = _SPARSE_CLASS[type(layer)]
        assert isinstance(layer, _TopK)
        layer.sparsity, layer.activation_sparsity, layer.topk_period = sparsity, activation_sparsity, topk_period
        layer.backend = backend
        layer.training_steps, layer.weight_threshold, layer.activation_threshold = 0, None, None
        layer.active_weights = None
    _disable_fused_transformer_paths(model)
    if backend == "reference":
        for module in model.modules():  # what an earlier call may have made of them
            if type(module) in layout.INNERMOST.values():
                module.__class__ = _PLAIN_CLASS[type(module)]
    else:
        _use_native_layout(model)
    _report_share(model, names, layers is None and getattr(model, "sparse_layers", None) is None)
    return names


def densify_(model: nn.Module) -> list[str]:
    """Undo `sparsify_` in place: the layers are PyTorch's own again, with the weights that training has left.

    Those are the dense ones, which an inactive weight is part of; see `bake_` for the top-k ones. Parameters and hooks
    stay, so an optimiser made before still holds.

    Returns:
        The names of the layers that were sparse, in the model's order.
    """
    names = [name for name, _ in sparse_layers(model)]
    for module in model.modules():
        if type(module) in _SPARSE_CLASS.values():
            for setting in _SETTINGS:
                delattr(module, setting)
        module.__class__ = _PLAIN_CLASS.get(type(module), type(module))
        if _FUSED in vars(module):
            module.activation_relu_or_gelu = vars(module).pop(_FUSED)
    return names


def bake_(model: nn.Module) -> list[str]:
    """Make the sparse layers PyTorch's own in place, with their top-k weights and zeros: for export and deployment.

    The model then gives what the sparse one gives in evaluation, and works with `torch.export`, `torch.jit` and
    `torch.onnx`. What is no top-k weight is lost, so bake a `copy.deepcopy` of a model that is to learn on. The layers'
    weights are new parameters, which an optimiser made before does not hold; a module that shared one keeps the old.

    Returns:
        The names of the layers that were sparse, in the model's order.

    Raises:
        ValueError: a weight that another parameter is the source of, as with weight normalisation or pruning.
    """
    layers = dict(sparse_layers(model))
    weights = {name: layer.weight for name, layer in layers.items()}
    if computed := [name for name, layer in layers.items() if "weight" not in layer._parameters]:
        raise ValueError(
            f"the weights of {', '.join(computed)} are computed from other parameters before each call; make them "
            "parameters first, for example with torch.nn.utils.remove_weight_norm or torch.nn.utils.prune.remove"
        )
    baked: dict[tuple[int, float], nn.Parameter] = {}
    for name, layer in layers.items():
        weight, key = weights[name].detach(), (id(weights[name]), layer.sparsity)
        if key not in baked:  # layers that share a weight go on doing so
            threshold = top_k_threshold(weight, count_top_k(weight.numel(), layer.sparsity))
            baked[key] = nn.Parameter(keep_active(weight, threshold), weights[name].requires_grad)
        layer.weight = baked[key]
    return densify_(model)


def sparse_layers(model: nn.Module) -> Iterator[tuple[str, SparseConv2d | SparseLinear]]:
    """The sparse layers of a model with their names, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, (SparseConv2d, SparseLinear)):
            yield name, module


def realised_sparsity(model: nn.Module) -> dict[str, float]:
    """The fraction of each sparse layer's weights that its last forward pass in training did not use.

    With `topk_period=1` that is the sparsity asked for, K being rounded up and ties all active. Above, the weights move
    while a threshold is reused, and it drifts. Layers that have not been trained yet are left out.
    """
    return {
        name: 1 - int(layer.active_weights) / layer.weight.numel()
        for name, layer in sparse_layers(model)
        if layer.active_weights is not None
    }


def _default_layers(model: nn.Module) -> list[str]:
    named = getattr(model, "sparse_layers", None)
    if named is not None:
        return list(named)
    holders = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    layers = {name: module for name, module in model.named_modules() if type(module) in _SPARSE_CLASS}
    weights: dict[str, Tensor] = {name: layer.weight for name, layer in layers.items()}
    return [
        name
        for name in default_by_shape({name: weight.shape for name, weight in weights.items()})
        if holders[id(weights[name])] <= 1 and weights[name].is_floating_point()
    ]


def _report_share(model: nn.Module, names: list[str], chosen_by_default: bool) -> None:
    """Log the part of the parameters that the sparse layers' weights are; warn where the default choice has few."""
    total = sum(p.numel() for p in model.parameters() if not isinstance(p, nn.UninitializedParameter))
    weights = {id(layer.weight): layer.weight.numel() for _, layer in sparse_layers(model)}
    percent = 100 * sum(weights.values()) / max(1, total)
    _log.info("sparsify_: %.1f %% of the model's parameters, in %s", percent, ", ".join(names))
    if chosen_by_default and percent < 50:
        warnings.warn(
            f"sparsify_ took {percent:.1f} % of the model's parameters by default (in {', '.join(names)}); the rest is "
            "trained and sent densely. Name the layers to take with layers=[...], which also silences this",
            stacklevel=3,
        )


def _use_native_layout(model: nn.Module) -> None:
    """Let the dense layers between the sparse ones keep the kernels' layout; tell once if there are no kernels."""
    if kernels.UNAVAILABLE:
        warnings.warn(
            f"zerofl's native kernels are not installed ({kernels.UNAVAILABLE}): sparse layers run on the reference, "
            "which is slower than dense training. Install it from its sources (pip install . in their folder) with a "
            "C++17 compiler, or say backend='reference'",
            stacklevel=3,
        )
        return
    if any(isinstance(layer, SparseConv2d) for _, layer in sparse_layers(model)):
        for module in model.modules():
            if layout.can_be_innermost(module):
                module.__class__ = layout.INNERMOST[type(module)]


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


def _disable_fused_transformer_paths(model: nn.Module) -> None:
    """Keep evaluation sparse where PyTorch would read `linear1.weight` itself and never call the sparse layer."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and any(sparse_layers(module)):
            vars(module).setdefault(_FUSED, module.activation_relu_or_gelu)
            module.activation_relu_or_gelu = 0  # the documented reason for which it takes the ordinary path
