import copy
import io
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import zerofl
from tests.conftest import needs_kernels
from zerofl import SparseConv2d, SparseLinear, sparsify_
from zerofl.models import LeafCNN, ResNet18
from zerofl.sparse import layout
from zerofl.sparse.layers import Backend


def unknown_model() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),  # 0: the first convolution
        nn.Conv2d(4, 4, 3),  # 1
        nn.Conv2d(4, 4, 1),  # 2: 1x1
        nn.Conv2d(4, 4, (1, 3)),  # 3: above 1x1
        nn.Flatten(),
        nn.Linear(32, 8),  # 5
        nn.Linear(8, 2),  # 6: the last linear
    )


@needs_kernels
def test_the_default_for_an_unknown_model() -> None:
    model = unknown_model()
    assert sparsify_(model) == ["1", "3", "5"]
    assert [type(m) for m in model] == [
        layout.Conv2d, SparseConv2d, layout.Conv2d, SparseConv2d, nn.Flatten, SparseLinear, nn.Linear,
    ]  # fmt: skip


def test_a_model_that_names_its_layers_decides() -> None:
    assert sparsify_(LeafCNN()) == ["conv1", "conv2", "fc1"]
    names = sparsify_(ResNet18(width=4))
    assert len(names) == 16
    assert names[0] == "layer1.0.conv1"
    assert names[-1] == "layer4.1.conv2"
    assert not any("shortcut" in name for name in names)


def test_named_layers_come_in_the_models_order() -> None:
    assert sparsify_(unknown_model(), layers=["6", "2"]) == ["2", "6"]


def test_the_state_dict_parameters_and_optimiser_stay() -> None:
    model = unknown_model()
    before, parameters = dict(model.state_dict()), list(model.parameters())
    sparsify_(model)
    assert list(model.state_dict()) == list(before)
    assert all(ours is theirs for ours, theirs in zip(model.parameters(), parameters, strict=True))
    unknown_model().load_state_dict(model.state_dict())


def test_hooks_and_a_layer_used_twice_stay() -> None:
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": shared, "out": nn.Linear(4, 2)})
    calls = []
    shared.register_forward_hook(lambda *_: calls.append(1))
    assert sparsify_(model, 0.5) == ["a"]
    assert model["a"] is model["b"]
    model["b"](torch.ones(1, 4))
    assert calls == [1]


def test_sparsity_zero_is_the_dense_model() -> None:
    dense = LeafCNN(classes=3)
    ours = copy.deepcopy(dense)
    sparsify_(ours, 0.0)
    x, y = torch.randn(4, 1, 28, 28), torch.tensor([0, 1, 2, 0])
    for model in (dense, ours):
        F.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
    for expected, actual in zip(dense.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad)
    torch.testing.assert_close(dense(x), ours(x))


def test_calling_again_changes_the_settings() -> None:
    model = unknown_model()
    sparsify_(model, 0.9, topk_period=3)
    model(torch.randn(1, 3, 8, 8)).sum().backward()
    sparsify_(model, 0.5, activation_sparsity=0.8)
    layer = model[5]
    assert isinstance(layer, SparseLinear)
    assert (layer.sparsity, layer.activation_sparsity, layer.topk_period) == (0.5, 0.8, 1)
    assert zerofl.realised_sparsity(model) == {}  # the old thresholds are gone
    assert "sparsity=0.5, activation_sparsity=0.8" in repr(model)


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity = 1.0: expected a fraction of zeros in \[0, 1\)"),
        ({"sparsity": -0.1}, r"sparsity = -0.1"),
        ({"activation_sparsity": 2}, r"activation_sparsity = 2"),
        ({"topk_period": 0}, r"topk_period = 0"),
        ({"topk_period": 1.5}, r"topk_period = 1.5: expected a number of forward passes, 1 or more"),
        ({"sparsity": "0.9"}, r"sparsity = 0.9: expected a fraction of zeros"),
        ({"layers": ["nope"]}, r"layer 'nope' is not in the model; its convolutions and linears are \['0'"),
        ({"layers": ["4"]}, r"layer '4' is a Flatten"),
        ({"layers": []}, "no layer to make sparse"),
        ({"layers": "1"}, r"did you mean \['1'\]"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    model = unknown_model()
    with pytest.raises(ValueError, match=message):
        sparsify_(model, **arguments)  # type: ignore[arg-type]
    assert not any(isinstance(m, (SparseConv2d, SparseLinear)) for m in model)  # nothing was half done


def test_a_subclass_with_its_own_forward_is_left_alone() -> None:
    model = nn.Sequential(Doubled(4, 4), nn.Linear(4, 20), nn.Linear(20, 1))
    assert sparsify_(model) == ["1"]
    with pytest.raises(ValueError, match=r"is a Doubled; only nn\.Conv2d and nn\.Linear themselves"):
        sparsify_(model, layers=["0"])


def test_complex_weights_have_no_top_k() -> None:
    model = nn.Sequential(nn.Linear(4, 4, dtype=torch.complex64), nn.Linear(4, 20), nn.Linear(20, 1))
    assert sparsify_(model) == ["1"]
    with pytest.raises(ValueError, match=r"layer '0' has weights of torch.complex64; only real ones"):
        sparsify_(model, layers=["0"])


def test_a_transformer_evaluates_sparsely_too() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    assert sparsify_(model, 0.9, layers=["linear1", "linear2"]) == ["linear1", "linear2"]
    x = torch.randn(2, 3, 8)
    trained = model(x)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), trained)


@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect"])
@pytest.mark.parametrize("padding", [1, "same", "valid", (2, 1)])
@pytest.mark.parametrize("options", [{}, {"dilation": 2}, {"groups": 2, "bias": False}])
def test_every_option_of_the_convolution_at_sparsity_zero(
    mode: str, padding: int | str, options: dict[str, object]
) -> None:
    torch.manual_seed(0)
    dense = nn.Conv2d(4, 6, 3, padding=padding, padding_mode=mode, **options)  # type: ignore[arg-type]
    ours = copy.deepcopy(dense)
    sparsify_(ours, 0.0, layers=[""])
    x = torch.randn(2, 4, 9, 8)
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    outputs = [layer(v) for layer, v in zip((dense, ours), inputs, strict=True)]
    torch.testing.assert_close(outputs[1], outputs[0])
    for output in outputs:
        output.square().sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    torch.testing.assert_close(ours.weight.grad, dense.weight.grad)


def test_a_compiled_model_trains_and_evaluates_alike_at_every_batch_size() -> None:
    torch.manual_seed(0)
    model = unknown_model()
    sparsify_(model, 0.6)
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, backend="eager")
    for batch in (2, 3, 5):
        x = torch.randn(batch, 3, 8, 8)
        outputs = [m(x) for m in (plain, compiled)]
        torch.testing.assert_close(outputs[1], outputs[0])
        for output in outputs:
            output.square().sum().backward()
        for expected, actual in zip(plain.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(actual.grad, expected.grad)
    with torch.no_grad():
        model.eval()
        torch.testing.assert_close(compiled(x), plain.eval()(x))


def checkpointed(model: nn.Sequential, segments: int, use_reentrant: bool) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        length = -(-len(model) // segments)
        for begin in range(0, len(model), length):
            x = checkpoint(model[begin : begin + length], x, use_reentrant=use_reentrant)
        return x

    return forward


def mlp(layer_used_twice: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    second = nn.Linear(30, 30)
    third = second if layer_used_twice else nn.Linear(30, 30)
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), second, nn.ReLU(), third, nn.ReLU(), nn.Linear(30, 3))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize(("segments", "layer_used_twice"), [(1, False), (3, False), (2, True)])
def test_gradient_checkpointing_changes_nothing(
    use_reentrant: bool, backend: Backend, segments: int, layer_used_twice: bool
) -> None:
    plain = mlp(layer_used_twice)
    sparsify_(plain, 0.8, backend=backend)
    ours = copy.deepcopy(plain)
    for step in range(3):
        x = torch.randn(8, 20, generator=torch.Generator().manual_seed(step), requires_grad=True)
        outputs = []
        for model, forward in ((plain, plain), (ours, checkpointed(ours, segments, use_reentrant))):
            model.zero_grad()
            outputs.append(forward(x))
            outputs[-1].square().sum().backward()
            torch.optim.SGD(model.parameters(), 0.01).step()
        torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=0)
        for expected, actual in zip(plain.parameters(), ours.parameters(), strict=True):
            torch.testing.assert_close(actual.grad, expected.grad, rtol=0, atol=0)
    assert zerofl.realised_sparsity(ours) == zerofl.realised_sparsity(plain)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_gradient_checkpointing_with_a_period_is_refused(use_reentrant: bool, backend: Backend) -> None:
    model = mlp()
    sparsify_(model, 0.8, topk_period=3, backend=backend)
    output = checkpointed(model, 1, use_reentrant)(torch.randn(8, 20, requires_grad=True))
    with pytest.raises(RuntimeError, match=r"topk_period = 3 with gradient checkpointing.* with topk_period=1"):
        output.sum().backward()  # type: ignore[no-untyped-call]
    output = checkpointed(model.eval(), 1, use_reentrant)(torch.randn(8, 20, requires_grad=True))
    output.sum().backward()  # type: ignore[no-untyped-call]


def test_a_sparse_model_can_be_saved_and_copied() -> None:
    model = unknown_model()
    sparsify_(model, 0.6)
    x = torch.randn(1, 3, 8, 8)
    model(x).sum().backward()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for clone in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(clone.eval()(x), model.eval()(x))
