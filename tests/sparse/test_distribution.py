"""Sparsity by layer: densities by hand, the same total, and layers that have them on both backends."""

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.running import experiment_of
from zerofl.data import load_dataset
from zerofl.exchange.update import Sparse
from zerofl.exchange.uplink import UPLINKS, make_update
from zerofl.fl.flops import training_flops
from zerofl.fl.train import empty_model, initial_model, train
from zerofl.models import LeafCNN, ResNet18, sparse_he_
from zerofl.sparse.dispatch import UNAVAILABLE
from zerofl.sparse.distribution import DISTRIBUTIONS, erdos_renyi_kernel, sparsity_with
from zerofl.sparse.sparsify import realised_sparsity, sparse_layers, sparsify_
from zerofl.sparse.topk import count_top_k, keep_active, top_k_threshold

# Dimensions add up to 4 + 2 + 3 + 3 = 12 and 20 + 10 = 30; 72 and 200 weights.
WEIGHTS = {"conv": torch.ones(4, 2, 3, 3), "linear": torch.ones(20, 10)}


def test_erdos_renyi_kernel_by_hand() -> None:
    # A quarter of 272 is 68: 68 / 42 = 1.619 for each dimension, 19.43 of conv and 48.57 of linear, rounded up.
    assert erdos_renyi_kernel(WEIGHTS, 0.75, 0.0) == {"conv": 20, "linear": 49}
    # Half and a tenth of 272 are 163.2, of which the dimensions would be 46.6 of 72, and 116.6 of 200.
    assert erdos_renyi_kernel(WEIGHTS, 0.5, 0.1) == {"conv": 47, "linear": 117}
    # Of a third layer of 6 weights and 5 dimensions 5 * 69.5 / 47 = 7.4 would be kept: it is whole, 63.5 are left.
    more = WEIGHTS | {"small": torch.ones(3, 2)}
    assert erdos_renyi_kernel(more, 0.75, 0.0) == {"conv": 19, "linear": 46, "small": 6}
    assert erdos_renyi_kernel(more, 0.5, 0.5) == {"conv": 72, "linear": 200, "small": 6}


@pytest.mark.parametrize(
    ("model", "percents"),
    [(ResNet18(), {0: 27, 15: 3.3}), (LeafCNN(), {0: 100, 1: 13, 2: 4.9})],
    ids=["resnet", "leaf"],
)
def test_the_densities_that_the_method_tells(model: ResNet18 | LeafCNN, percents: dict[int, float]) -> None:
    weights = {name: model.get_parameter(f"{name}.weight") for name in model.sparse_layers}
    densities = [100 * k / weights[name].numel() for name, k in erdos_renyi_kernel(weights, 0.95, 0.0).items()]
    for layer, percent in percents.items():
        assert float(f"{densities[layer]:.2g}") == percent


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("mask_ratio", [0.0, 0.2])
def test_the_total_is_that_of_equal_sparsities(distribution: str, mask_ratio: float) -> None:
    for model in (ResNet18(width=16), LeafCNN()):
        weights = {name: model.get_parameter(f"{name}.weight") for name in model.sparse_layers}
        counts = DISTRIBUTIONS[distribution](weights, 0.95, mask_ratio)
        total = sum(w.numel() for w in weights.values())
        assert 0 <= sum(counts.values()) - (0.05 + mask_ratio) * total < len(weights)
        assert all(1 <= counts[name] <= weights[name].numel() for name in weights)


@given(st.integers(1, 10**7).flatmap(lambda numel: st.tuples(st.integers(1, numel), st.just(numel))))
def test_a_layers_sparsity_keeps_exactly_k(k_of_numel: tuple[int, int]) -> None:
    k, numel = k_of_numel
    assert count_top_k(numel, sparsity_with(k, numel)) == k


@pytest.mark.parametrize("uplink", [name for name in UPLINKS if name != "full"])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_what_is_sent_has_the_same_distribution(uplink: str, distribution: str) -> None:
    generator = torch.Generator().manual_seed(0)
    received, trained = (
        {name: torch.randn(w.shape, generator=generator) for name, w in WEIGHTS.items()} for _ in range(2)
    )
    update = make_update(uplink, received, trained, WEIGHTS, 0.9, 0.1, distribution)
    ranks = {name: UPLINKS[uplink].ranks(received[name], trained[name]) for name in WEIGHTS}
    counts = DISTRIBUTIONS[distribution](ranks, 0.9, 0.1)
    sent = {name: t.values.numel() for name, t in update.tensors.items() if isinstance(t, Sparse)}
    assert sent == counts


@pytest.mark.skipif(bool(UNAVAILABLE), reason="the kernels are not installed")
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_both_backends_train_with_the_layers_own_sparsities(distribution: str) -> None:
    torch.manual_seed(0)
    native = LeafCNN(classes=5)
    sparse_he_(native, 0.95, torch.Generator().manual_seed(0), distribution)
    reference = copy.deepcopy(native)
    images, labels = torch.rand(6, 1, 28, 28), torch.arange(6) % 5
    gradients = []
    for model, backend in ((native, "native"), (reference, "reference")):
        sparsify_(model, 0.95, distribution=distribution, backend=backend)  # type: ignore[arg-type]
        torch.nn.functional.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        counts = DISTRIBUTIONS[distribution]({n: layer.weight for n, layer in sparse_layers(model)}, 0.95, 0.0)
        for name, realised in realised_sparsity(model).items():
            assert realised == pytest.approx(1 - counts[name] / model.get_parameter(f"{name}.weight").numel())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6)


def test_sparse_he_scales_by_each_layers_own_k() -> None:
    model = LeafCNN()
    sparse_he_(model, 0.95, torch.Generator().manual_seed(0), "erdos_renyi_kernel")
    weights = {name: model.get_parameter(f"{name}.weight").detach() for name in model.sparse_layers}
    for name, k in erdos_renyi_kernel(weights, 0.95, 0.0).items():
        top_k = keep_active(weights[name], top_k_threshold(weights[name], k))
        torch.testing.assert_close(top_k.square().mean(), torch.tensor(2 / weights[name][0].numel()))


@pytest.mark.parametrize("distribution", [name for name in DISTRIBUTIONS if name != "uniform"])
def test_an_experiments_model_has_it_and_so_has_its_arithmetic(distribution: str, cifar_root: Path) -> None:
    dataset = load_dataset("cifar10", str(cifar_root))
    uniform, dealt = (experiment_of(cifar_root, sparsity_distribution=name) for name in ("uniform", distribution))
    model, state = empty_model(dealt, dataset), initial_model(dealt, dataset).state_dict()
    model.load_state_dict(state, assign=True)
    weights = {name: layer.weight.detach().clone() for name, layer in sparse_layers(model)}
    sparsities = {name: layer.sparsity for name, layer in sparse_layers(model)}
    counts = DISTRIBUTIONS[distribution](weights, 0.9, 0.0)
    assert {name: count_top_k(weights[name].numel(), sparsity) for name, sparsity in sparsities.items()} == counts
    dealt_flops, uniform_flops = (training_flops(e, dataset) for e in (dealt, uniform))
    assert dealt_flops.dense == uniform_flops.dense
    assert dealt_flops.sparse > uniform_flops.sparse  # more is left of the layers on large images
    train(model, dataset.train.take(torch.arange(8)), dataset, dealt, round=1, client=0)
    assert realised_sparsity(model) == pytest.approx(sparsities)  # also after a step: K is that of what was received


def test_an_unknown_distribution_is_named() -> None:
    with pytest.raises(ValueError, match="distribution = 'global': expected one of uniform, erdos_renyi_kernel"):
        sparsify_(LeafCNN(), 0.95, distribution="global")
    with pytest.raises(ValueError, match=r"distribution = \['uniform'\]: expected one of uniform"):
        sparsify_(LeafCNN(), 0.95, distribution=["uniform"])  # type: ignore[arg-type]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_a_weight_of_two_layers_is_dealt_once_in_training_and_sending(distribution: str) -> None:
    model = nn.ModuleDict({"a": nn.Linear(60, 60), "b": nn.Linear(60, 60), "c": nn.Linear(60, 30)})
    model["b"].weight = model["a"].weight
    sparsify_(model, 0.8, distribution=distribution, layers=["a", "b", "c"])
    trains = {f"{n}.weight": count_top_k(layer.weight.numel(), layer.sparsity) for n, layer in sparse_layers(model)}
    state = model.state_dict()
    update = make_update("top_k_weights", state, state, list(trains), 0.8, 0.0, distribution)
    sent = {name: t.values.numel() for name, t in update.tensors.items() if isinstance(t, Sparse)}
    assert trains == sent
    assert sent["a.weight"] + sent["c.weight"] == pytest.approx(0.2 * 5400, abs=2)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_an_empty_layer_has_nothing_to_deal(distribution: str) -> None:
    model = nn.Sequential(nn.Linear(0, 4), nn.Linear(4, 40))
    sparsify_(model, 0.5, distribution=distribution, layers=["0", "1"])
    assert [layer.sparsity for _, layer in sparse_layers(model)] == [0.5, 0.5]
    model(torch.ones(2, 0))
    assert realised_sparsity(model) == {"1": 0.5}
