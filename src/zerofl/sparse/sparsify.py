"""`sparsify_`, which makes layers of a dense model sparse in place, and what undoes it.

Layers are re-classed, as torch.nn.utils.parametrize does: a module keeps its identity, so hooks, parameters that an
optimiser holds and modules used in two places all stay as they were.
"""

import logging
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from zerofl.sparse import blocks, dispatch, layout
from zerofl.sparse.default_layers import default_by_shape
from zerofl.sparse.distribution import DISTRIBUTIONS, sparsity_by_layer
from zerofl.sparse.layers import Backend, SparseConv2d, SparseLinear, TopKLayer
from zerofl.sparse.topk import count_top_k, keep_active, top_k_threshold

_log = logging.getLogger(__name__)

# By exact type: a subclass of nn.Conv2d has a forward of its own that must not be lost.
_SPARSE_CLASS: dict[type[nn.Module], type[SparseConv2d] | type[SparseLinear]] = {
    nn.Conv2d: SparseConv2d,
    nn.Linear: SparseLinear,
    layout.Conv2d: SparseConv2d,
    SparseConv2d: SparseConv2d,
    SparseLinear: SparseLinear,
}


_INNERMOST: dict[type[nn.Module], type[nn.Module]] = {**layout.INNERMOST, nn.Sequential: blocks.Sequential}
_PLAIN_CLASS: dict[type[nn.Module], type[nn.Module]] = {
    **{double: plain for plain, double in _INNERMOST.items()},
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
    distribution: str = "uniform",
    layers: Iterable[str] | None = None,
    topk_period: int = 1,
    backend: Backend = "auto",
    storage: str = "float32",
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
        distribution: how the weights are dealt to the layers: "uniform", the same part of each, as in the paper; or
            "erdos_renyi_kernel", more of small layers, the same in all (docs/method.md, "Sparsity by layer").
        layers: qualified names of the layers to swap. Default: `model.sparse_layers` where the model names them (those
            of `zerofl.models` name the paper's), else every linear but the last and every convolution above 1x1 but the
            first; in a model with depthwise convolutions not these but the 1x1 ones (the rule is that of
            `zerofl.sparse.default_layers`); and no layer whose weight another module uses. It warns if these have less
            than half of the parameters.
        topk_period: forward passes in training between two computations of a layer's thresholds. Above 1 the sparsity
            drifts in between (see `realised_sparsity`), and gradient checkpointing is refused: a pass that the backward
            pass repeats could not have the thresholds of the first one.
        backend: "native" computes with the non-zeros only, on the CPU in float32; "reference" with masks in plain
            PyTorch, anywhere; "auto" is native where it can be. Both give the same up to rounding. With the native
            kernels, the model's plain `nn.Conv2d`, `nn.BatchNorm2d` and `nn.MaxPool2d` become those of
            `zerofl.sparse.layout` if a convolution was made sparse: the same layers, without moving data in between;
            and its `nn.Sequential` one that makes a convolution, normalisation and ReLU a single operation in training.
            Their outputs are then stored with the batch innermost, in whatever memory format the input or the model
            is: behind them `.view()` of several dimensions at once fails, `.flatten()` and `.reshape()` work.
        storage: "float16" or "bfloat16" keep what each `nn.BatchNorm2d` itself reads in training in 16 bits. It takes
            less memory on the native kernels, and gives the same on the reference; arithmetic stays float32. float16 is
            finer, but what is above 65,504 becomes infinite in it.

    A weight that several modules share stays one parameter. A layer that is named here takes the top-k part of it, a
    module that is not, such as an embedding, all of it; the gradient is the sum of both.

    Returns:
        The names of the swapped layers, in the model's order.

    Raises:
        ValueError: a sparsity or period out of range, an unknown distribution, a name that is not a convolution or
            linear of the model or has complex weights, no layer to swap, or a storage where there is no batch
            normalisation; called again, a layer that was changed since, as `densify_`.
    """
    activation_sparsity = sparsity if activation_sparsity is None else activation_sparsity
    _check_settings(sparsity, activation_sparsity, distribution, layers, topk_period, backend, storage)
    _check_unchanged(model)
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
    norms = [m for m in modules.values() if type(m) in (nn.BatchNorm2d, layout.BatchNorm2d)]
    if storage != "float32" and not norms:
        raise ValueError(f"storage = {storage!r}: it is of what nn.BatchNorm2d reads, and the model has none")

    names = [name for name in modules if name in set(names)]
    first_of = {id(modules[name].weight): name for name in reversed(names)}  # a weight that layers share counts once
    dealt = sparsity_by_layer({name: modules[name].weight for name in first_of.values()}, distribution, sparsity)
    for name in names:
        layer = modules[name]
        layer.__class__ = _SPARSE_CLASS[type(layer)]
        assert isinstance(layer, TopKLayer)
        layer.sparsity = dealt[first_of[id(layer.weight)]]
        layer.activation_sparsity, layer.topk_period = activation_sparsity, topk_period
        layer.backend = backend
        layer.training_steps, layer.weight_threshold, layer.activation_threshold = 0, None, None
        layer.active_weights = None
    _disable_fused_transformer_paths(model)
    if backend == "reference":
        for module in model.modules():  # what an earlier call may have made of them
            if type(module) in _INNERMOST.values():
                module.__class__ = _PLAIN_CLASS[type(module)]
    else:
        _use_native_layout(model)
    for norm in norms:
        if storage != "float32":
            norm.__class__ = layout.BatchNorm2d
        if isinstance(norm, layout.BatchNorm2d):
            norm.storage, norm.backend = storage, backend
    _report_share(model, names, layers is None and getattr(model, "sparse_layers", None) is None)
    return names


def _check_settings(
    sparsity: float,
    activation_sparsity: float,
    distribution: str,
    layers: Iterable[str] | None,
    topk_period: int,
    backend: str,
    storage: str,
) -> None:
    """Raise what `sparsify_` says of the values alone."""
    for argument, value in (("sparsity", sparsity), ("activation_sparsity", activation_sparsity)):
        if not isinstance(value, (int, float)) or not 0 <= value < 1:  # type: ignore[redundant-expr]
            raise ValueError(f"{argument} = {value}: expected a fraction of zeros in [0, 1), for example 0.95")
    if not isinstance(distribution, str) or distribution not in DISTRIBUTIONS:  # type: ignore[redundant-expr]
        raise ValueError(f"distribution = {distribution!r}: expected one of {', '.join(DISTRIBUTIONS)}")
    if not isinstance(topk_period, int) or topk_period < 1:  # type: ignore[redundant-expr]
        raise ValueError(f"topk_period = {topk_period}: expected a number of forward passes, 1 or more")
    if backend not in ("auto", "native", "reference"):
        raise ValueError(f"backend = {backend!r}: expected 'auto', 'native' or 'reference'")
    if backend == "native" and dispatch.UNAVAILABLE:
        raise ValueError(f"backend = 'native': the native kernels are not installed ({dispatch.UNAVAILABLE})")
    if not isinstance(storage, str) or storage not in layout.STORAGE:  # type: ignore[redundant-expr]
        raise ValueError(f"storage = {storage!r}: expected one of {', '.join(layout.STORAGE)}")
    if isinstance(layers, str):
        raise ValueError(f"layers = {layers!r}: expected a list of names; did you mean [{layers!r}]?")


def densify_(model: nn.Module) -> list[str]:
    """Undo `sparsify_` in place: the layers are PyTorch's own again, with the weights that training has left.

    Those are the dense ones, which an inactive weight is part of; see `bake_` for the top-k ones. Parameters and hooks
    stay, so an optimiser made before still holds.

    Returns:
        The names of the layers that were sparse, in the model's order.

    Raises:
        ValueError: a layer that was changed since, as `torch.nn.utils.parametrize` does.
    """
    _check_unchanged(model)
    names = [name for name, _ in sparse_layers(model)]
    for module in model.modules():
        if type(module) in _SPARSE_CLASS.values():
            for setting in _SETTINGS:
                delattr(module, setting)
        elif isinstance(module, nn.BatchNorm2d):
            vars(module).pop("storage", None), vars(module).pop("backend", None)
        module.__class__ = _PLAIN_CLASS.get(type(module), type(module))
        if _FUSED in vars(module):
            module.activation_relu_or_gelu = vars(module).pop(_FUSED)
    return names


def _check_unchanged(model: nn.Module) -> None:
    """Raise what `densify_` says of a sparse layer, or a neighbour of one, that was changed since."""
    ours = tuple(_PLAIN_CLASS)
    if changed := [n for n, module in model.named_modules() if isinstance(module, ours) and type(module) not in ours]:
        raise ValueError(
            f"{', '.join(changed)} was given another class after sparsify_, as by a parametrization: remove that "
            "first, for example with torch.nn.utils.parametrize.remove_parametrizations"
        )


def bake_(model: nn.Module) -> list[str]:
    """Make the sparse layers PyTorch's own in place, with their top-k weights and zeros: for export and deployment.

    The model then gives what the sparse one gives in evaluation, and works with `torch.export`, `torch.jit` and
    `torch.onnx`. What is no top-k weight is lost, so bake a `copy.deepcopy` of a model that is to learn on. The layers'
    weights are new parameters, which an optimiser made before does not hold; a module that shared one keeps the old.

    Returns:
        The names of the layers that were sparse, in the model's order.

    Raises:
        ValueError: a weight that another parameter is the source of, as with weight normalisation or pruning; or as
            `densify_`.
    """
    layers = dict(sparse_layers(model))
    weights = {name: layer.weight for name, layer in layers.items()}
    if computed := [name for name, layer in layers.items() if "weight" not in layer._parameters]:
        raise ValueError(
            f"the weights of {', '.join(computed)} are computed from other parameters before each call; make them "
            "parameters first, for example with torch.nn.utils.remove_weight_norm or torch.nn.utils.prune.remove"
        )
    _check_unchanged(model)  # before any weight is replaced
    baked: dict[tuple[int, float], nn.Parameter] = {}
    for name, layer in layers.items():
        weight, key = weights[name].detach(), (id(weights[name]), layer.sparsity)
        if key not in baked:  # layers that share a weight still do
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

    With `topk_period=1` that is the sparsity asked for, K being rounded up and ties all active; more where fewer than K
    weights are not zero. Above, the weights move while a threshold is reused, and it drifts. Layers that have not been
    trained yet are left out.
    """
    return {
        name: 1 - int(layer.active_weights) / layer.weight.numel()
        for name, layer in sparse_layers(model)
        if layer.active_weights is not None and layer.weight.numel()
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
    """Let the dense layers between the sparse ones keep the kernels' layout, and chains of them be one operation.

    It tells once if there are no kernels.
    """
    if dispatch.UNAVAILABLE:
        warnings.warn(
            f"zerofl's native kernels are not installed ({dispatch.UNAVAILABLE}): sparse layers run on the reference, "
            "which is slower than dense training. Install it from its sources (pip install . in their folder) with a "
            "C++17 compiler, or say backend='reference'",
            stacklevel=3,
        )
        return
    if any(isinstance(layer, SparseConv2d) for _, layer in sparse_layers(model)):
        for module in model.modules():
            if type(module) is nn.Sequential or layout.can_be_innermost(module):
                module.__class__ = _INNERMOST[type(module)]


def _disable_fused_transformer_paths(model: nn.Module) -> None:
    """Keep evaluation sparse where PyTorch would read `linear1.weight` itself and never call the sparse layer."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and any(sparse_layers(module)):
            vars(module).setdefault(_FUSED, module.activation_relu_or_gelu)
            module.activation_relu_or_gelu = 0  # the documented reason for which it takes the ordinary path
