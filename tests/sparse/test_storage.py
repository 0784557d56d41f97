"""What a normalisation moves and stores: running statistics as PyTorch has them, 16 bits only where asked for."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from zerofl.sparse import blocks
from zerofl.sparse.sparsify import densify_, sparsify_

from .test_conv_norm import small_resnet


@pytest.mark.parametrize(
    ("setting", "value"), [("track_running_stats", False), ("num_batches_tracked", None), ("momentum", None)]
)
def test_running_statistics_are_pytorchs(setting: str, value: object) -> None:
    """Whatever is switched off behind the constructor's back, as those do who freeze statistics for a while."""
    results = []
    for one in (True, False):
        convolution, norm = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        torch.nn.init.constant_(convolution.weight, 0.1)
        setattr(norm, setting, value)
        if one:
            sparsify_(nn.Sequential(convolution, norm), 0.0, layers=["0"])
        for seed in (0, 1):
            blocks.conv_norm_relu(
                convolution, norm, torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(seed))
            )
        results.append([norm.running_mean, norm.running_var, norm.num_batches_tracked])
    for ours, theirs in zip(*results, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            torch.testing.assert_close(ours, theirs)


def test_nothing_is_rounded_outside_training() -> None:
    convolution, norm = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4, track_running_stats=False)
    model = nn.Sequential(convolution, norm)
    x = torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(1))
    results = []
    for storage in ("float32", "bfloat16"):
        sparsify_(model, 0.5, layers=["0"], storage=storage)
        model.eval()
        plain = blocks.conv_norm_relu(convolution, norm, x)
        with torch.no_grad():
            results += [plain.detach(), blocks.conv_norm_relu(convolution, norm, x)]
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize(
    ("storage", "model", "message"),
    [
        ("float8", small_resnet, "storage = 'float8': expected one of float32, float16, bfloat16"),
        ("float16", lambda: nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)), "reads, and the model has none"),
    ],
)
def test_a_storage_that_means_nothing_is_refused(storage: str, model: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sparsify_(model(), 0.5, layers=None if storage == "float8" else ["0"], storage=storage)


def test_a_second_call_and_densify_take_the_storage_back() -> None:
    model = small_resnet()
    sparsify_(model, 0.8, storage="float16")
    assert model.bn1.storage == "float16"
    sparsify_(model, 0.8)
    assert model.bn1.storage == "float32"
    sparsify_(model, 0.8, storage="bfloat16")
    densify_(model)
    assert type(model.bn1) is nn.BatchNorm2d
    assert "storage" not in vars(model.bn1)
