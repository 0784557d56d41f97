import pytest
import torch

from zerofl.exchange.update import Sparse, Update, sparsified
from zerofl.exchange.uplink import UPLINKS, make_update
from zerofl.sparse.topk import count_top_k

RECEIVED = {"w": torch.tensor([[5.0, 1.0, 0.0], [-3.0, 2.0, 4.0]]), "b": torch.tensor([1.0]), "n": torch.tensor(3)}
TRAINED = {"w": torch.tensor([[5.5, 1.0, 2.5], [-3.0, 0.5, 4.0]]), "b": torch.tensor([3.0]), "n": torch.tensor(7)}

# K = ceil((1 - 0.6 + 0.1) * 6) = 3 of the six. The largest trained weights are 5.5, 4 and -3; the largest of the
# changes 0.5, 0, 2.5, 0, -1.5, 0 are 2.5, -1.5 and 0.5. A change of zero is on the mask but need not be sent.
EXPECTED = {
    "full": ([0, 1, 2, 3, 4, 5], [5.5, 1.0, 2.5, -3.0, 0.5, 4.0], 3.0),
    "top_k_weights": ([0, 3, 5], [5.5, -3.0, 4.0], 3.0),
    "diff_on_top_k_weights": ([0], [0.5], 2.0),
    "top_k_weights_diff": ([0, 2, 4], [0.5, 2.5, -1.5], 2.0),
}


def update_of(uplink: str, sparsity: float = 0.6, mask_ratio: float = 0.1) -> Update:
    return make_update(uplink, RECEIVED, TRAINED, ["w"], sparsity, mask_ratio)


def test_every_strategy_is_tested() -> None:
    assert EXPECTED.keys() == UPLINKS.keys()


@pytest.mark.parametrize("uplink", UPLINKS)
def test_what_each_strategy_sends(uplink: str) -> None:
    update = update_of(uplink)
    positions, values, bias = EXPECTED[uplink]
    sent = update.tensors["w"]
    if not isinstance(sent, Sparse):
        sent = sparsified(sent)
    assert sent.mask().nonzero()[0].tolist() == positions
    assert sent.values.tolist() == values
    assert update.tensors["b"].tolist() == [bias]  # type: ignore[union-attr]  # dense layers are sent whole
    assert update.tensors["n"].item() == 7  # type: ignore[union-attr]  # counters are sent as they are
    assert update.adds == (uplink in ("diff_on_top_k_weights", "top_k_weights_diff"))


@pytest.mark.parametrize("uplink", UPLINKS)
@pytest.mark.parametrize("mask_ratio", [0.0, 0.1, 0.2])
def test_k_entries_of_each_layer_are_sent(uplink: str, mask_ratio: float) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = {"a": (40, 30), "b": (7, 5, 3)}
    received, trained = (
        {name: torch.randn(size, generator=generator) for name, size in sizes.items()} for _ in range(2)
    )
    update = make_update(uplink, received, trained, sizes, 0.9, mask_ratio)
    for name, tensor in update.tensors.items():
        numel = trained[name].numel()
        sent = tensor.values.numel() if isinstance(tensor, Sparse) else tensor.numel()
        assert sent == (numel if uplink == "full" else count_top_k(numel, 0.9, mask_ratio))


@pytest.mark.parametrize("uplink", UPLINKS)
@pytest.mark.parametrize("mask_ratio", [0.6, 0.9])
def test_a_mask_ratio_of_the_sparsity_or_more_sends_the_whole_model(uplink: str, mask_ratio: float) -> None:
    update = update_of(uplink, mask_ratio=mask_ratio)
    sent = update.tensors["w"]
    dense = sent.to_dense() if isinstance(sent, Sparse) else sent
    assert torch.equal(dense, TRAINED["w"] - RECEIVED["w"] if update.adds else TRAINED["w"])


def test_the_received_and_the_trained_model_are_left_as_they_are() -> None:
    received, trained = ({name: t.clone() for name, t in state.items()} for state in (RECEIVED, TRAINED))
    for uplink in UPLINKS:
        make_update(uplink, received, trained, ["w"], 0.6, 0.1)
    assert all(torch.equal(received[name], RECEIVED[name]) for name in RECEIVED)
    assert all(torch.equal(trained[name], TRAINED[name]) for name in TRAINED)


@pytest.mark.parametrize("uplink", UPLINKS)
@pytest.mark.parametrize("after", [TRAINED["w"].double(), TRAINED["w"].half(), TRAINED["w"][:1]])
def test_a_tensor_of_another_type_or_shape_is_named(uplink: str, after: torch.Tensor) -> None:
    with pytest.raises(
        ValueError, match=r"tensor 'w' came as torch.float32 \(2, 3\) and is torch\.float\d\d \(\d, 3\)"
    ):
        make_update(uplink, RECEIVED, TRAINED | {"w": after}, ["w"], 0.6, 0.1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("uplink", UPLINKS)
def test_another_type_than_float32_is_named_with_the_fix(uplink: str, dtype: torch.dtype) -> None:
    received, trained = (
        {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}
        for state in (RECEIVED, TRAINED)
    )
    with pytest.raises(ValueError, match=rf"tensor 'w' is {dtype}: only float32 can be sent; model.float\(\) makes it"):
        make_update(uplink, received, trained, ["w"], 0.6, 0.1)
