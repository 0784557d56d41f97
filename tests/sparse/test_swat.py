"""SWAT's three products against plain loops in float64, which share no code with the package."""

import copy
import math
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from zerofl import realised_sparsity, sparsify_
from zerofl.sparse.layers import Backend
from zerofl.sparse.topk import count_top_k

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def top_k_by_hand(x: np.ndarray, sparsity: float) -> np.ndarray:
    """Keep the ceil((1 - sparsity) * numel) entries of largest magnitude; the drawn values have no ties."""
    k = math.ceil(round((1 - sparsity) * x.size, 9))
    kept = np.zeros_like(x)
    for index in sorted(np.ndindex(x.shape), key=lambda i: -abs(x[i]))[:k]:
        kept[index] = x[index]
    return kept


def convolution_by_hand(
    x: np.ndarray, w: np.ndarray, b: np.ndarray, dy: np.ndarray | None, stride: int, padding: int, sparsity: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The output and, for the output gradient dy, grad_input and grad_weight, term by term."""
    ws, xs = top_k_by_hand(w, sparsity), top_k_by_hand(x, sparsity)
    (n_, c_, h_, w_), (o_, _, kh, kw) = x.shape, w.shape
    ho, wo = (h_ + 2 * padding - kh) // stride + 1, (w_ + 2 * padding - kw) // stride + 1
    y = np.zeros((n_, o_, ho, wo)) + b[:, None, None]
    dx, dw = np.zeros_like(x), np.zeros_like(w)
    for n, o, i, j, c, p, q in product(range(n_), range(o_), range(ho), range(wo), range(c_), range(kh), range(kw)):
        r, s = i * stride + p - padding, j * stride + q - padding
        if 0 <= r < h_ and 0 <= s < w_:
            y[n, o, i, j] += ws[o, c, p, q] * x[n, c, r, s]
            if dy is not None:
                dx[n, c, r, s] += ws[o, c, p, q] * dy[n, o, i, j]
                dw[o, c, p, q] += xs[n, c, r, s] * dy[n, o, i, j]
    return y, dx, dw


def numpy(x: Tensor | None) -> np.ndarray:
    assert x is not None
    return x.detach().cpu().numpy()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sparsity", [0.0, 0.7, 0.95])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (5, 1, 2), (3, 2, 0), (1, 1, 0), (2, 3, 1)]
)
def test_convolution(device: str, sparsity: float, kernel: int, stride: int, padding: int) -> None:
    generator = torch.Generator().manual_seed(kernel * 10 + stride)
    layer = nn.Conv2d(3, 4, kernel, stride, padding, dtype=torch.float64)
    sparsify_(layer, sparsity, layers=[""])
    layer.to(device)
    x = torch.randn(2, 3, 6, 7, generator=generator, dtype=torch.float64).to(device).requires_grad_()
    y = layer(x)
    dy = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(device)
    y.backward(dy)
    expected = convolution_by_hand(
        numpy(x), numpy(layer.weight), numpy(layer.bias), numpy(dy), stride, padding, sparsity
    )
    for ours, by_hand in zip((y, x.grad, layer.weight.grad), expected, strict=True):
        np.testing.assert_allclose(numpy(ours), by_hand, rtol=1e-10, atol=1e-12)
    assert layer.bias is not None
    np.testing.assert_allclose(numpy(layer.bias.grad), numpy(dy).sum((0, 2, 3)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("leading", [(6,), (2, 3), ()])
def test_linear(device: str, leading: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    layer = nn.Linear(10, 8, dtype=torch.float64)
    sparsify_(layer, 0.9, layers=[""], activation_sparsity=0.7)
    layer.to(device)
    x = torch.randn(*leading, 10, generator=generator, dtype=torch.float64).to(device).requires_grad_()
    y = layer(x)
    dy = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(device)
    y.backward(dy)
    ws, xs = top_k_by_hand(numpy(layer.weight), 0.9), top_k_by_hand(numpy(x), 0.7)
    np.testing.assert_allclose(numpy(y), numpy(x) @ ws.T + numpy(layer.bias), rtol=1e-10)
    np.testing.assert_allclose(numpy(x.grad), numpy(dy) @ ws, rtol=1e-10, atol=1e-12)
    by_hand = np.einsum("ro,ri->oi", numpy(dy).reshape(-1, 8), xs.reshape(-1, 10))
    np.testing.assert_allclose(numpy(layer.weight.grad), by_hand, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(numpy(layer.bias.grad), numpy(dy).reshape(-1, 8).sum(0), rtol=1e-10)


def test_an_inactive_weight_learns_and_can_become_active() -> None:
    layer = nn.Linear(2, 1, bias=False)
    sparsify_(layer, 0.5, layers=[""], activation_sparsity=0.0)
    layer.weight.data = torch.tensor([[1.0, 0.1]])
    assert layer(torch.ones(1, 2)).item() == 1.0  # 0.1 is inactive
    (-10 * layer(torch.ones(1, 2))).backward()
    layer.weight.data -= 0.1 * layer.weight.grad  # type: ignore[operator]
    torch.testing.assert_close(layer.weight.data, torch.tensor([[2.0, 1.1]]))
    layer.weight.data[0, 0] = 1.0
    torch.testing.assert_close(layer(torch.ones(1, 2)), torch.tensor([[1.1]]))


def test_evaluation_uses_the_top_k_weights_of_now() -> None:
    layer = nn.Linear(4, 1, bias=False)
    sparsify_(layer, 0.75, layers=[""], topk_period=100)
    layer.weight.data = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    layer(torch.ones(1, 4))  # takes the training threshold, 4
    layer.weight.data = torch.tensor([[5.0, 6.0, 7.0, 8.0]])
    assert layer(torch.ones(1, 4)).item() == 26.0  # under the old threshold, all
    layer.eval()
    assert layer(torch.ones(1, 4)).item() == 8.0
    with torch.no_grad():
        assert layer.train()(torch.ones(1, 4)).item() == 8.0


def test_the_period_reuses_the_threshold_and_the_realised_sparsity_drifts() -> None:
    layer = nn.Linear(4, 1, bias=False)
    sparsify_(layer, 0.75, layers=[""], topk_period=2)
    assert realised_sparsity(layer) == {}
    layer.weight.data = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    layer(torch.ones(1, 4))
    assert realised_sparsity(layer) == {"": 0.75}
    layer.weight.data *= 2  # 2 4 6 8 against the threshold 4
    assert realised_sparsity(layer) == {"": 0.75}  # what the pass used, whatever the weights are by now
    assert layer(torch.ones(1, 4)).item() == 18.0
    assert realised_sparsity(layer) == {"": 0.25}
    assert layer(torch.ones(1, 4)).item() == 8.0  # the third step takes a new threshold
    assert realised_sparsity(layer) == {"": 0.75}


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("period", [1, 2])
def test_weights_that_are_zero_are_not_used(backend: Backend, period: int) -> None:
    layer = nn.Linear(10, 10)
    sparsify_(layer, 0.9, layers=[""], topk_period=period, backend=backend)
    with torch.no_grad():
        layer.weight.zero_()[0, :3] = 1.0
    for _ in range(2):
        layer(torch.ones(2, 10))
        assert realised_sparsity(layer) == {"": 0.97}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("sparsity", [0.0, 0.9, 0.95])
@pytest.mark.parametrize("period", [1, 3])
@pytest.mark.parametrize(
    "layer", [nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(4, 16, (1, 3), stride=2), nn.Linear(40, 30)], ids=str
)
def test_the_realised_sparsity_is_what_every_forward_pass_used(
    layer: nn.Module, period: int, sparsity: float, backend: Backend
) -> None:
    layer = copy.deepcopy(layer)
    sparsify_(layer, sparsity, layers=[""], topk_period=period, backend=backend)
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    generator = torch.Generator().manual_seed(0)
    for step in range(4):
        with torch.no_grad():
            weight.view(-1)[:20] = 0.25  # ties, at whatever rank
        threshold = weight.abs().flatten().topk(count_top_k(weight.numel(), sparsity)).values[-1].item()
        if step % period == 0:
            kept = threshold
        used = (weight.abs() >= kept).sum().item()
        shape = (5, 40) if weight.dim() == 2 else (5, weight.shape[1], 8, 8)
        optimizer.zero_grad()
        layer(torch.randn(shape, generator=generator)).square().mean().backward()
        optimizer.step()  # what the weights are afterwards is not what the pass used
        assert realised_sparsity(layer) == {"": 1 - used / weight.numel()}


def test_a_frozen_layer_and_a_leaf_input_need_no_gradient() -> None:
    layer = nn.Conv2d(2, 2, 3)
    sparsify_(layer, 0.9, layers=[""])
    layer(torch.randn(1, 2, 5, 5)).sum().backward()  # the input asks for none
    assert layer.weight.grad is not None
    layer.requires_grad_(False)
    x = torch.randn(1, 2, 5, 5, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None


def test_autocast_trains_in_its_lower_precision() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 16), nn.Linear(16, 4))
    sparsify_(model, 0.8, layers=["1", "3"])
    x = torch.randn(2, 3, 8, 8)
    model(x).sum().backward()
    exact = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    for parameter, expected in zip(model.parameters(), exact, strict=True):
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        relative = (parameter.grad - expected).norm() / expected.norm()
        assert relative < 0.1  # bfloat16 has 8 bits; a top-k choice at the threshold may differ
