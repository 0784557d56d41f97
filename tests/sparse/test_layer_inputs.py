"""What a sparse layer takes, and what it refuses in the dense layer's words."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from zerofl import sparsify_
from zerofl.sparse.layers import Backend


def test_the_activations_k_counts_the_input_before_padding() -> None:
    torch.manual_seed(0)
    tuples, strings = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding="same")
    strings.load_state_dict(tuples.state_dict())
    x = torch.randn(2, 2, 4, 4)
    for layer in (tuples, strings):
        sparsify_(layer, 0.8, layers=[""])
        layer(x).square().sum().backward()
    torch.testing.assert_close(strings.weight.grad, tuples.weight.grad)


def test_unbatched_and_channels_last_inputs() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 5, 3, padding=1)
    sparsify_(layer, 0.7, layers=[""])
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(layer(x[0]), layer(x)[0])
    torch.testing.assert_close(layer(x.to(memory_format=torch.channels_last)), layer(x))


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(4, 6),
    "conv": lambda: nn.Conv2d(4, 6, 3, padding=1),
    "unpadded": lambda: nn.Conv2d(4, 6, 3, dilation=2, bias=False),
    "same": lambda: nn.Conv2d(4, 6, 3, padding="same"),
    "reflect": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    "grouped": lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2),
}

OTHER_TYPES = [
    torch.uint8, torch.int64, torch.bool, torch.float64, torch.float16, torch.bfloat16, torch.complex64
]  # fmt: skip

# Inputs that the dense layer refuses, and some that it takes.
INPUTS: dict[str, list[object]] = {
    "linear": [
        *(torch.ones(2, 4, dtype=dtype) for dtype in OTHER_TYPES),
        *(torch.ones(shape) for shape in [(2, 5), (6, 2), (2, 8), (5,), (), (0,), (0, 5), (2, 0), (2, 4, 3)]),
        *(torch.ones(shape) for shape in [(4,), (1, 4), (0, 4), (2, 0, 4), (2, 3, 4)]),
        None, "x", [1.0, 2.0, 3.0, 4.0], torch.ones(2, 4, device="meta"),
    ],
    "conv": [
        *(torch.ones(2, 4, 5, 5, dtype=dtype) for dtype in OTHER_TYPES),
        *(torch.ones(shape) for shape in [(2, 3, 5, 5), (3, 5, 5), (), (5,), (4, 5), (1, 2, 4, 5, 5), (2, 8, 5, 5)]),
        *(torch.ones(shape) for shape in [(0, 3, 5, 5), (2, 4, 0, 5), (2, 4, 5, 0), (2, 0, 5, 5), (4, 0, 5), (0,)]),
        *(torch.ones(shape) for shape in [(2, 4, 5, 5), (4, 5, 5), (2, 4, 1, 1), (2, 4, 4, 5), (0, 4, 5, 5)]),
        None, "x",
    ],
}  # fmt: skip


def outcome(layer: nn.Module, input: object) -> object:
    try:
        return list(layer(input).shape)
    except Exception as error:
        return type(error), str(error)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("backend", ["auto", "native", "reference"])
@pytest.mark.parametrize("with_grad", [True, False])
def test_what_the_dense_layer_refuses_is_refused_in_its_words(kind: str, backend: Backend, with_grad: bool) -> None:
    if (kind, backend) == ("grouped", "native"):
        pytest.skip("which the kernels do not do")
    refused = 0
    for input in INPUTS.get(kind, INPUTS["conv"]):
        dense = LAYERS[kind]()
        ours = copy.deepcopy(dense)
        sparsify_(ours, 0.5, layers=[""], topk_period=2, backend=backend)
        with torch.set_grad_enabled(with_grad):
            expected = outcome(dense, input)
            assert outcome(ours, input) == expected
        if isinstance(expected, tuple):
            refused += 1
            assert ours.training_steps == 0
    assert refused > 10


def test_what_autocast_casts_is_taken() -> None:
    for layer, shape in ((nn.Linear(4, 6), (2, 4)), (nn.Conv2d(4, 6, 3), (2, 4, 5, 5))):
        sparsify_(layer, 0.5, layers=[""])
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            with torch.autocast("cpu", torch.bfloat16):
                assert layer(torch.ones(shape, dtype=dtype)).dtype == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError):
            layer(torch.ones(shape, dtype=torch.uint8))


def test_a_sparse_tensor_is_refused_with_what_to_do() -> None:
    layer = nn.Linear(4, 6)
    sparsify_(layer, 0.5, layers=[""])
    with pytest.raises(TypeError, match=r"got torch.sparse_coo; of a sparse tensor give its \.to_dense\(\)"):
        layer(torch.ones(2, 4).to_sparse())


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("shape", [(4,), (1, 4), (5, 4), (2, 3, 4), (2, 1, 3, 4)])
def test_a_linear_layers_output_is_laid_out_as_ever(backend: Backend, shape: tuple[int, ...]) -> None:
    layer = nn.Linear(4, 6)
    sparsify_(layer, 0.5, layers=[""], backend=backend)
    output = layer(torch.randn(shape))
    assert output.stride() == torch.empty(*shape[:-1], 6).stride()
    output.view(-1, 3).square().sum().backward()
    F.relu(layer(torch.randn(shape)), inplace=True).sum().backward()  # type: ignore[no-untyped-call]


def test_an_empty_batch_is_no_step() -> None:
    layer = nn.Linear(4, 2)
    sparsify_(layer, 0.5, layers=[""], topk_period=2)
    layer(torch.empty(0, 4)).sum().backward()
    x = torch.randn(3, 4)
    for _ in range(2):  # the first takes the thresholds, the second uses them
        layer.weight.grad = None
        layer(x).sum().backward()
        assert layer.weight.grad is not None
        assert layer.weight.grad.any()
    assert layer.training_steps == 2
