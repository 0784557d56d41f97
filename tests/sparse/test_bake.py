"""`densify_` and `bake_`: PyTorch's own layers again, with the dense weights or the top-k ones, and their export."""

import copy
import inspect
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import zerofl
from tests.conftest import needs_kernels
from zerofl.models import LeafCNN, ResNet18
from zerofl.sparse import layout
from zerofl.sparse.layers import Backend
from zerofl.sparse.sparsify import sparse_layers
from zerofl.sparse.topk import count_top_k, keep_active, top_k_threshold


def stack() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, padding="same"), nn.MaxPool2d(2),
        nn.Conv2d(16, 16, 3, groups=2), nn.Flatten(), nn.Linear(16 * 5 * 5, 20), nn.Linear(20, 4),
    )  # fmt: skip


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[str] | None]] = {
    "stack": (stack, (3, 16, 16), None),
    "resnet": (lambda: ResNet18(width=4), (3, 32, 32), None),
    "leaf": (LeafCNN, (1, 28, 28), None),
    "transformer": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True),
        (3, 8),
        ["linear1", "linear2"],
    ),
}


def trained(name: str, backend: Backend = "auto") -> tuple[nn.Module, nn.Module, Tensor, torch.optim.Optimizer]:
    """The dense model, the same sparse and after a step of training, an input, and the optimiser."""
    make, shape, layers = MODELS[name]
    torch.manual_seed(0)
    dense, x = make(), torch.randn(4, *shape)
    model = copy.deepcopy(dense)
    zerofl.sparsify_(model, 0.8, layers=layers, backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(x).square().mean().backward()
    optimizer.step()
    return dense, model, x, optimizer


@pytest.mark.parametrize("name", MODELS)
def test_densify_restores_the_layers_and_keeps_the_weights(name: str) -> None:
    dense, model, x, optimizer = trained(name)
    zerofl.sparsify_(model, 0.5, layers=MODELS[name][2])  # again, as when settings change
    state, parameters = copy.deepcopy(model.state_dict()), list(model.parameters())
    calls: list[int] = []
    names = [name for name, _ in sparse_layers(model)]
    model.get_submodule(names[0]).register_forward_hook(lambda *_: calls.append(1))
    assert zerofl.densify_(model) == names
    for ours, theirs in zip(model.modules(), dense.modules(), strict=True):
        assert type(ours) is type(theirs)
        assert vars(ours).keys() == vars(theirs).keys()
        assert getattr(ours, "activation_relu_or_gelu", None) == getattr(theirs, "activation_relu_or_gelu", None)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert all(ours is theirs for ours, theirs in zip(model.parameters(), parameters, strict=True))
    dense.load_state_dict(state)
    torch.testing.assert_close(model(x), dense(x), rtol=0, atol=0)
    assert calls == [1]
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()
    assert not torch.equal(next(model.parameters()), next(dense.parameters()))
    assert zerofl.densify_(model) == []


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("name", MODELS)
def test_a_baked_model_gives_what_the_sparse_one_gives_in_evaluation(name: str, backend: Backend) -> None:
    if (name, backend) == ("stack", "native"):
        backend = "auto"  # for its groups
    dense, model, x, _ = trained(name, backend)
    dense_weights = {name: layer.weight.detach().clone() for name, layer in sparse_layers(model)}
    with torch.no_grad():
        expected = model.eval()(x)
        assert zerofl.bake_(model) == list(dense_weights)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert [type(m) for m in model.modules()] == [type(m) for m in dense.modules()]
    assert list(model.state_dict()) == list(dense.state_dict())
    for name, weight in dense_weights.items():
        threshold = top_k_threshold(weight, count_top_k(weight.numel(), 0.8))
        torch.testing.assert_close(model.state_dict()[f"{name}.weight"], keep_active(weight, threshold), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit's own
@pytest.mark.parametrize("name", ["stack", "resnet", "leaf"])
def test_a_baked_model_can_be_exported_and_traced(name: str) -> None:
    _, model, x, _ = trained(name)
    with torch.no_grad():
        expected = model.eval()(x)
        zerofl.bake_(model)
        exported = torch.export.export(model, (x,)).module()
        buffer = io.BytesIO()
        torch.jit.save(torch.jit.trace(model, x), buffer)  # type: ignore[no-untyped-call]
        buffer.seek(0)
        for each in (exported, torch.jit.load(buffer)):  # type: ignore[no-untyped-call]
            torch.testing.assert_close(each(x), expected, rtol=1e-4, atol=1e-5)


def test_a_baked_model_can_be_exported_to_onnx(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    _, model, x, _ = trained("stack")
    zerofl.bake_(model.eval())
    torch.onnx.export(model, (x,), str(tmp_path / "model.onnx"))
    assert (tmp_path / "model.onnx").stat().st_size > 0


EXPORTS: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "export": lambda model, x: torch.export.export(model, (x,), strict=False),
    "strict export": lambda model, x: torch.export.export(model, (x,), strict=True),
    "trace": lambda model, x: torch.jit.trace(model, x),  # type: ignore[no-untyped-call]
    "script": lambda model, x: torch.jit.script(model),
    "fx": lambda model, x: torch.fx.symbolic_trace(model),
}


@pytest.mark.filterwarnings("ignore")  # torch.jit's and its tracer's own
@pytest.mark.parametrize("kind", EXPORTS)
@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("name", ["leaf", "transformer"])
def test_a_sparse_model_says_to_bake_first(kind: str, backend: Backend, name: str) -> None:
    if (kind, name) == ("fx", "transformer"):
        pytest.skip("which torch.fx cannot trace when it is dense either")
    if "export" in kind and "reason" not in inspect.signature(torch.compiler.disable).parameters:
        pytest.skip("this PyTorch does not tell when it exports, or not why it cannot")
    _, model, x, _ = trained(name, backend)
    with pytest.raises(Exception, match=r"call zerofl\.bake_\(model\)"):
        EXPORTS[kind](model.eval(), x)


def test_baking_leaves_a_module_that_shares_the_weight_alone() -> None:
    embedding, dense, *sparse = nn.Embedding(10, 4), *(nn.Linear(4, 10, bias=False) for _ in range(3))
    for linear in (dense, *sparse):
        linear.weight = embedding.weight
    model = nn.ModuleList([embedding, dense, *sparse])
    zerofl.sparsify_(model, 0.75, layers=["2", "3"])
    before = embedding.weight.detach().clone()
    zerofl.bake_(model)
    assert dense.weight is embedding.weight
    assert torch.equal(embedding.weight, before)
    assert sparse[0].weight is sparse[1].weight  # one parameter still, as they were
    assert sparse[0].weight.count_nonzero() == 10


def test_a_weight_that_is_computed_cannot_be_baked() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    zerofl.sparsify_(model, 0.5, layers=["0", "1"])
    prune.identity(model[1], "weight")  # type: ignore[no-untyped-call]
    with pytest.raises(ValueError, match=r"the weights of 1 are computed from other parameters.*prune\.remove"):
        zerofl.bake_(model)
    assert [name for name, _ in sparse_layers(model)] == ["0", "1"]
    prune.remove(model[1], "weight")  # type: ignore[no-untyped-call]
    assert zerofl.bake_(model) == ["0", "1"]


def test_a_layer_that_is_parametrized_cannot_be_made_dense() -> None:
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))
    zerofl.sparsify_(model, 0.5, layers=["0", "1"])
    nn.utils.parametrizations.weight_norm(model[0])
    with pytest.raises(ValueError, match="^0 was given another class after sparsify_.*remove_parametrizations"):
        zerofl.densify_(model)
    assert len(list(sparse_layers(model))) == 2
    nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    assert zerofl.densify_(model) == ["0", "1"]
    assert type(model[0]) is nn.Linear


def test_a_layer_whose_bias_is_parametrized_is_not_baked_by_half() -> None:
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))
    zerofl.sparsify_(model, 0.5, layers=["0", "1"])
    nn.utils.parametrize.register_parametrization(model[1], "bias", nn.Identity())
    weights = [layer.weight for _, layer in sparse_layers(model)]
    with pytest.raises(ValueError, match="^1 was given another class after sparsify_"):
        zerofl.bake_(model)
    assert all(a is b for a, b in zip(weights, (layer.weight for _, layer in sparse_layers(model)), strict=True))


@needs_kernels
def test_a_dense_neighbour_is_plain_again_too() -> None:
    model = stack()
    zerofl.sparsify_(model, 0.5)
    assert any(type(module).__module__ == layout.__name__ for module in model)
    zerofl.densify_(model)
    assert not any(type(module).__module__.startswith("zerofl") for module in model)


def test_a_dense_neighbour_that_is_parametrized_is_named_too() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))
    zerofl.sparsify_(model, 0.5, layers=["3"], backend="native")
    nn.utils.parametrizations.spectral_norm(model[0])
    again = lambda model: zerofl.sparsify_(model, 0.9, layers=["3"], backend="reference")  # noqa: E731
    for change in (zerofl.densify_, zerofl.bake_, again):
        with pytest.raises(ValueError, match="^0 was given another class after sparsify_"):
            change(model)
    nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    assert zerofl.densify_(model) == ["3"]
    assert type(model[0]) is nn.Conv2d
