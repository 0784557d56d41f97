"""Parameters of two names, through an adopted strategy."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import FedAdam, FedAvg, FedMedian, Strategy
from torch import nn

from tests.flower.adopted import Tied, refusals, start, train_tied
from zerofl.exchange.update import Sparse
from zerofl.exchange.uplink import UPLINKS, make_update, tied
from zerofl.exchange.wire import VALUES, decode, encode, schema_of
from zerofl.flower import SparseUplink, uplink_mod


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("uplink", UPLINKS)
@pytest.mark.parametrize("layers", [None, ["encoder"], ["decoder", "hidden"]])
def test_tied_weights_stay_equal(layers: list[str] | None, uplink: str, values: str) -> None:
    """As two names with a choice each, one would be sparse and the other whole, and int8 would round each alone."""
    mod = uplink_mod(uplink, sparsity=0.9, mask_ratio=0.1, layers=layers, values=values)
    initial = ArrayRecord(Tied().state_dict())
    after = start(SparseUplink(FedAvg()), initial, train_tied, mod).to_torch_state_dict()
    assert torch.equal(after["encoder.weight"], after["decoder.weight"])
    assert not torch.equal(after["encoder.weight"], initial.to_torch_state_dict()["encoder.weight"])


@pytest.mark.parametrize("strategy", [FedAdam, FedMedian])
def test_tied_weights_stay_equal_with_other_strategies(strategy: Callable[[], Strategy]) -> None:
    arrays = ArrayRecord(Tied().state_dict())
    mod = uplink_mod(sparsity=0.9, layers=["encoder"])
    after = start(SparseUplink(strategy()), arrays, train_tied, mod).to_torch_state_dict()
    assert torch.equal(after["encoder.weight"], after["decoder.weight"])


@pytest.mark.parametrize(
    ("sparse", "expected"), [(["encoder.weight"], 20), (["decoder.weight"], 20), (["hidden.weight"], 96), ([], 96)]
)
def test_a_tied_parameter_is_sparse_if_one_of_its_names_is(sparse: list[str], expected: int) -> None:
    """K = ceil((1 - 0.9 + 0.1) * 12 * 8) = ceil(19.2) = 20 of 96 entries, or all of them."""
    received = Tied().state_dict()
    trained = train_tied(ArrayRecord(received), 0).to_torch_state_dict()
    assert tied(received, trained) == {
        name: "encoder.weight" if name == "decoder.weight" else name for name in received
    }  # fmt: skip
    update = make_update("top_k_weights", received, trained, sparse, 0.9, 0.1)
    sent = update.tensors["encoder.weight"]
    assert (sent.values.numel() if isinstance(sent, Sparse) else sent.numel()) == expected
    assert update.tensors["decoder.weight"] is sent


def test_what_is_equal_only_before_or_after_training_is_not_tied() -> None:
    """Two copies of one start, which training takes apart; and two that training takes to zero."""
    a, b, zero = torch.ones(2, 2), torch.eye(2), torch.zeros(2, 2)
    assert tied({"a": a, "b": a.clone()}, {"a": a, "b": b}) == {"a": "a", "b": "b"}
    assert tied({"a": a, "b": b}, {"a": zero, "b": zero.clone()}) == {"a": "a", "b": "b"}


def test_a_tied_parameter_of_which_the_server_has_two_values_is_named(caplog: pytest.LogCaptureFixture) -> None:
    untied = Tied()
    untied.decoder.weight = nn.Parameter(torch.randn(12, 8))
    text = refusals(caplog, ArrayRecord(untied.state_dict()), train_tied)
    assert "'encoder.weight' and 'decoder.weight' came with different values and are the same after training" in text


@pytest.mark.parametrize("values", VALUES)
def test_one_tensor_of_two_names_comes_out_of_the_wire_the_same(values: str) -> None:
    received = Tied().state_dict()
    trained = train_tied(ArrayRecord(received), 0).to_torch_state_dict()
    update = make_update("top_k_weights_diff", received, trained, ["encoder.weight"], 0.5, 0.0)
    schema = schema_of(received)
    decoded = decode(encode(update, schema, values=values, generator=np.random.default_rng(0)), schema).tensors
    one, other = (decoded[f"{name}.weight"] for name in ("encoder", "decoder"))
    assert isinstance(one, Sparse)
    assert isinstance(other, Sparse)
    assert torch.equal(one.to_dense(), other.to_dense())
