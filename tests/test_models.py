import pytest
import torch
from torch import nn

from zerofl.exchange.wire import schema_of
from zerofl.models import LeafCNN, ResNet18, build_model, initialize_, sparse_he_
from zerofl.report.paper_bytes import PAPER_MB, paper_csr_bytes, paper_full_bytes
from zerofl.sparse.topk import count_top_k, keep_active, top_k_threshold


def test_parameter_counts_are_the_papers() -> None:
    assert sum(p.numel() for p in ResNet18().parameters()) == 11_173_962
    assert sum(p.numel() for p in LeafCNN().parameters()) == 6_603_710
    assert LeafCNN().fc1.weight.numel() / 6_603_710 == pytest.approx(0.973, abs=5e-4)


def test_resnet_sparse_layers_hold_10_985_472_weights() -> None:
    model = ResNet18()
    assert sum(model.get_parameter(f"{name}.weight").numel() for name in model.sparse_layers) == 10_985_472


@pytest.mark.parametrize(("sparsity", "megabytes"), [(0.90, (10.13, 18.71, 27.29)), (0.95, (5.84, 14.42, 23.00))])
def test_the_papers_file_sizes(sparsity: float, megabytes: tuple[float, ...]) -> None:
    """Table 1 prints 10.1 18.7 27.3, 5.9 14.4 23.0, and 43.7 for the full model."""
    model = ResNet18()
    schema, sparse = schema_of(model.state_dict()), [f"{name}.weight" for name in model.sparse_layers]
    for mask_ratio, expected in zip((0.0, 0.1, 0.2), megabytes, strict=True):
        assert paper_csr_bytes(schema, sparse, sparsity, mask_ratio) / PAPER_MB == pytest.approx(expected, abs=5e-3)
    assert paper_full_bytes(schema) == 4 * 11_183_562
    assert paper_full_bytes(schema) / PAPER_MB == pytest.approx(43.69, abs=5e-3)


def test_shapes() -> None:
    assert ResNet18(classes=12, in_channels=1, width=4)(torch.randn(2, 1, 32, 32)).shape == (2, 12)
    assert LeafCNN()(torch.randn(2, 1, 28, 28)).shape == (2, 62)


def test_width_narrows_every_stage() -> None:
    model = ResNet18(width=16)
    shapes = [model.get_parameter(f"layer{stage}.1.conv2.weight").shape for stage in (1, 2, 3, 4)]
    assert shapes == [(16, 16, 3, 3), (32, 32, 3, 3), (64, 64, 3, 3), (128, 128, 3, 3)]


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(ValueError, match="model = 'vgg': expected one of"):
        build_model("vgg", 10, 3, 64)


def test_sparse_he_keeps_hes_variance_in_the_top_k_part() -> None:
    model = LeafCNN()
    sparse_he_(model, 0.95, torch.Generator().manual_seed(0))
    for name in model.sparse_layers:
        weight = model.get_parameter(f"{name}.weight").detach()
        top_k = keep_active(weight, top_k_threshold(weight, count_top_k(weight.numel(), 0.95)))
        fan_in = weight[0].numel()
        torch.testing.assert_close(top_k.square().mean(), torch.tensor(2 / fan_in))
        assert not model.get_parameter(f"{name}.bias").any()
    fc2 = model.fc2.weight.detach()
    torch.testing.assert_close(fc2.square().mean(), torch.tensor(2 / 2048), rtol=0.02, atol=0)


@pytest.mark.parametrize("initialization", ["he", "sparse_he"])
def test_initialisation_is_a_function_of_the_seed_and_leaves_the_global_state(initialization: str) -> None:
    weights = []
    before = torch.random.get_rng_state()
    for seed in (1, 1, 2):
        with torch.random.fork_rng():
            model: nn.Module = LeafCNN(classes=2)
        initialize_(model, initialization, 0.9, seed)
        weights.append(model.get_parameter("conv1.weight"))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert torch.equal(before, torch.random.get_rng_state())
