"""The uplink with models that are not ours: tied weights, arrays without names, wrappers, other types."""

import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import flwr.server.strategy
import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Context, Message
from flwr.serverapp.strategy import FedAvg
from torch import nn

from tests.flower.adopted import CLIENTS, Tied, refusals, start, train_tied
from zerofl.exchange.wire import schema_of
from zerofl.flower import SparseUplink, uplink_mod
from zerofl.flower.messages import payload_record
from zerofl.sparse.topk import count_top_k


class Lstm(nn.Module):
    """No array of it is called `weight` but the last layer's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lstm = nn.LSTM(4, 8)
        self.fc = nn.Linear(8, 3)


def moved(arrays: ArrayRecord, client: int) -> ArrayRecord:
    """As if trained: every array changes, by each client in its own way."""
    generator = np.random.default_rng(client)
    return ArrayRecord([a.numpy() + generator.normal(size=a.numpy().shape).astype("f4") for a in arrays.values()])


def numbered(*shapes: tuple[int, ...]) -> ArrayRecord:
    """Arrays with the keys "0", "1" and so on, as an app with lists of arrays sends them."""
    generator = np.random.default_rng(0)
    return ArrayRecord([generator.normal(size=shape).astype("f4") for shape in shapes])


def test_a_model_of_which_nothing_would_be_sparse_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    text = refusals(caplog, numbered((8, 4), (8,), (3, 8)), moved)
    assert "no array to send a part of: looked for kernels above 1x1 and matrices named weight" in text
    assert "in 0 (8, 4), 1 (8,), 2 (3, 8). Name the layers or the arrays" in text
    assert "uplink_mod(layers=['0', '2'], ...)" in text  # the largest


def test_an_lstm_is_refused_and_its_arrays_named(caplog: pytest.LogCaptureFixture) -> None:
    text = refusals(caplog, ArrayRecord(Lstm().state_dict()), lambda arrays, client: arrays)
    assert "uplink_mod(layers=['lstm.weight_hh_l0', 'lstm.weight_ih_l0'], ...)" in text
    caplog.clear()
    layers = ["lstm.weight_hh_l0", "lstm.weight_ih_l0"]
    strategy = SparseUplink(FedAvg())
    mod = uplink_mod(sparsity=0.9, layers=layers)
    start(strategy, ArrayRecord(Lstm().state_dict()), lambda arrays, client: arrays, mod, rounds=1)
    assert "Received 3 results and 0 failures" in caplog.text


def test_arrays_are_named_in_full() -> None:
    """Of array "0" the top K = ceil(0.1 * 400) = 40 entries move for each client, at most 120; "2" moves whole."""
    arrays = numbered((20, 20), (20,), (3, 20))
    after = start(SparseUplink(FedAvg()), arrays, moved, uplink_mod(sparsity=0.9, layers=["0"]), rounds=1)
    # Averaging rounds what has not moved; what has moved is far larger.
    moves = [
        int((abs(a.numpy() - b.numpy()) > 1e-4).sum()) for a, b in zip(arrays.values(), after.values(), strict=True)
    ]
    k = count_top_k(400, 0.9)
    assert k <= moves[0] <= CLIENTS * k
    assert moves[1:] == [20, 60]


def test_the_whole_model_needs_no_names() -> None:
    arrays = numbered((8, 4), (8,))
    after = start(SparseUplink(FedAvg()), arrays, moved, uplink_mod("full", sparsity=0.9), rounds=1)
    assert all((a.numpy() != b.numpy()).all() for a, b in zip(arrays.values(), after.values(), strict=True))


def test_a_layer_that_is_not_there_is_named_and_nothing_is_trained(caplog: pytest.LogCaptureFixture) -> None:
    def never(arrays: ArrayRecord, client: int) -> ArrayRecord:
        raise AssertionError("trained in vain")

    text = refusals(caplog, ArrayRecord(Lstm().state_dict()), never, layers=["fc", "conv"])
    assert "the model that came has neither conv nor conv.weight; it has lstm.weight_ih_l0, " in text
    assert "trained in vain" not in text
    caplog.clear()
    text = refusals(caplog, ArrayRecord(Lstm().state_dict()), never, layers=["fc.bias"], uplink="full")
    assert "layers: fc.bias is no weight of a layer that sparsify_ takes" in text


def compiled(model: nn.Module) -> nn.Module:
    wrapper = torch.compile(model)
    assert isinstance(wrapper, nn.Module)
    return wrapper


def renamed(arrays: ArrayRecord, rename: Callable[[str], str]) -> ArrayRecord:
    return ArrayRecord(OrderedDict((rename(name), array) for name, array in arrays.items()))


@pytest.mark.parametrize(
    ("wrap", "hint"),
    [
        (compiled, "'_orig_mod.' is what torch.compile adds: give back the model inside, model._orig_mod."),
        (nn.DataParallel, "'module.' is what DataParallel and DistributedDataParallel add: give back the model inside"),
        (lambda model: nn.DataParallel(compiled(model)), "the model inside, model.module._orig_mod.state_dict()"),
    ],
    ids=["torch.compile", "DataParallel", "both"],
)
def test_a_wrappers_names_are_told(
    wrap: Callable[[nn.Module], nn.Module], hint: str, caplog: pytest.LogCaptureFixture
) -> None:
    wrapped = ArrayRecord(wrap(Tied()).state_dict())
    text = refusals(caplog, ArrayRecord(Tied().state_dict()), lambda arrays, client: wrapped)
    assert hint in text
    assert "expected encoder.weight, hidden.weight, hidden.bias, decoder.weight, decoder.bias" in text


def test_opacus_names_are_told(caplog: pytest.LogCaptureFixture) -> None:
    arrays = ArrayRecord(Tied().state_dict())
    text = refusals(caplog, arrays, lambda arrays, client: renamed(arrays, lambda name: f"_module.{name}"))
    assert "'_module.' is what Opacus's GradSampleModule adds: give back the model inside, model._module.state" in text


def test_a_wrapper_around_a_part_is_told(caplog: pytest.LogCaptureFixture) -> None:
    arrays = ArrayRecord(Tied().state_dict())
    text = refusals(
        caplog, arrays, lambda arrays, client: renamed(arrays, lambda n: n.replace("hidden.", "hidden._orig_mod."))
    )
    assert "'_orig_mod.' is what torch.compile adds: give back the model inside, its names without that part" in text


def test_a_wrapper_on_the_server_is_told(caplog: pytest.LogCaptureFixture) -> None:
    sent = renamed(ArrayRecord(Tied().state_dict()), lambda name: f"module.{name}")
    plain = ArrayRecord(Tied().state_dict())
    text = refusals(caplog, sent, lambda arrays, client: plain)
    assert "send out the model inside, model.module.state_dict()" in text
    caplog.clear()
    text = refusals(caplog, sent, lambda arrays, client: plain, layers=["hidden"])
    assert "'module.' is what DataParallel and DistributedDataParallel add" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda names: [*names, "extra"], "the reply's model has extra; expected encoder.weight, hidden.weight, "),
        (lambda names: names[1:], "the reply's model lacks encoder.weight; expected encoder.weight, hidden.weight, "),
    ],
    ids=["one too many", "one too few"],
)
def test_other_names_are_told(
    change: Callable[[list[str]], list[str]], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    arrays = ArrayRecord(Tied().state_dict())

    def train(arrays: ArrayRecord, client: int) -> ArrayRecord:
        some = arrays["hidden.bias"]
        return ArrayRecord(OrderedDict((name, arrays.get(name, some)) for name in change(list(arrays))))

    assert message in refusals(caplog, arrays, train)


def test_an_array_that_a_strategy_adds_is_named() -> None:
    class Adding(FedAvg):
        def aggregate_train(self, *arguments: Any) -> Any:
            arrays, metrics = super().aggregate_train(*arguments)
            assert arrays is not None
            return renamed(arrays, lambda name: name.replace("hidden.bias", "step")), metrics

    with pytest.raises(ValueError, match="the strategy within SparseUplink gave back step, which it was not given"):
        start(SparseUplink(Adding()), ArrayRecord(Tied().state_dict()), train_tied, uplink_mod(sparsity=0.9), rounds=1)


class _OldStyle(flwr.server.strategy.FedAvg):
    pass


@pytest.mark.parametrize("strategy", [flwr.server.strategy.FedAvg(), _OldStyle()])
def test_an_old_strategy_is_refused_at_construction(strategy: Any) -> None:
    with pytest.raises(
        TypeError,
        match=r"expected a strategy of flwr\.serverapp\.strategy: .* of flwr\.server\.strategy is one of the old",
    ):
        SparseUplink(strategy)


def test_what_is_no_strategy_is_refused_at_construction() -> None:
    with pytest.raises(TypeError, match=r"did you mean SparseUplink\(FedAvg\(\.\.\.\)\)\?"):
        SparseUplink(FedAvg)  # type: ignore[arg-type]
    with pytest.raises(
        TypeError, match=r"SparseUplink\(builtins\.str\): expected a strategy of flwr\.serverapp\.strategy"
    ):
        SparseUplink("FedAvg")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": "a"}, r"sparsity = 'a', mask_ratio = 0.0: expected fractions in \[0, 1\) and \[0, 1\]"),
        ({"sparsity": None}, "sparsity = None, mask_ratio = 0.0: expected fractions"),
        ({"sparsity": 0.9, "mask_ratio": "0.2"}, "mask_ratio = '0.2': expected fractions"),
        ({"sparsity": 0.9, "mask_ratio": [0.2]}, r"mask_ratio = \[0.2\]: expected fractions"),
        ({"sparsity": float("nan")}, "sparsity = nan, mask_ratio = 0.0: expected fractions"),
        ({"sparsity": True}, "sparsity = True, mask_ratio = 0.0: expected fractions"),
        ({"sparsity": 0.9, "seed": "one"}, "seed = 'one': expected a whole number, 0 or more"),
        ({"sparsity": 0.9, "seed": 1.5}, "seed = 1.5: expected a whole number, 0 or more"),
        ({"sparsity": 0.9, "seed": -1}, "seed = -1: expected a whole number, 0 or more"),
        ({"sparsity": 0.9, "values": ["int8"]}, r"values = \['int8'\]: expected of"),
        ({"sparsity": 0.9, "values": None}, "values = None: expected of"),
        ({"sparsity": 0.9, "uplink": ["full"]}, r"uplink = \['full'\], .*: expected of"),
        ({"sparsity": 0.9, "layers": "fc"}, r"layers = 'fc': expected a list of names; did you mean \['fc'\]"),
        ({"sparsity": 0.9, "layers": 3}, "layers = 3: expected a list of names"),
        ({"sparsity": 0.9, "layers": [0, 1]}, r"layers = \[0, 1\]: expected a list of names"),
        ({"sparsity": 0.9, "layers": []}, r"layers = \[\]: expected a list of names, .* say uplink = 'full'"),
    ],
)
def test_an_argument_of_another_type_says_what_was_expected(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        uplink_mod(**arguments)


def test_numpys_numbers_are_numbers() -> None:
    uplink_mod(sparsity=np.float32(0.5), mask_ratio=np.float64(0.1), seed=np.int64(3))  # type: ignore[arg-type]


def test_each_round_shows_what_came_up(caplog: pytest.LogCaptureFixture) -> None:
    """Flower's log, at the level it shows by default: the bytes, those of three whole models, and their ratio."""
    strategy = SparseUplink(FedAvg())
    with caplog.at_level(logging.INFO, "flwr"):
        start(strategy, numbered((100, 100), (3, 100)), moved, uplink_mod(sparsity=0.9, layers=["0"]))
    whole = CLIENTS * 4 * (100 * 100 + 300)
    for round in (1, 2):
        sent = strategy.uplink_bytes[round]
        assert (
            f"round {round}: 3 updates came up in {sent / 1e6:.2f} MB; whole models are {whole / 1e6:.2f} MB, "
            f"{whole / sent:.1f} times as much" in caplog.text
        )


@pytest.mark.parametrize(
    ("payload", "cause"),
    [(b"", "the payload ends within the header"), (b"garbage" * 10, "the payload starts with b'garb'")],
)
def test_a_payload_that_is_no_update_is_left_out(payload: bytes, cause: str, caplog: pytest.LogCaptureFixture) -> None:
    """And its bytes with it, which are no part of what the updates took."""

    def empty(message: Message, context: Context, call_next: Any) -> Message:
        reply: Message = call_next(message, context)
        reply.content["arrays"] = payload_record(payload)
        return reply

    strategy = SparseUplink(FedAvg())
    start(strategy, ArrayRecord(Tied().state_dict()), lambda arrays, client: arrays, empty, rounds=1)
    assert strategy.uplink_bytes == {1: 0}
    assert f"is left out: {cause}" in caplog.text


@pytest.mark.parametrize(
    ("dtype", "fix"),
    [
        (torch.float16, r"model\.float\(\) makes it float32"),
        (torch.bfloat16, r"model\.float\(\) makes it float32"),
        (torch.float64, r"model\.float\(\) makes it float32"),
        (torch.bool, r"keep it as int64, tensor\.long\(\), .*persistent=False"),
        (torch.int32, r"keep it as int64, tensor\.long\(\), .*persistent=False"),
        (torch.uint8, r"keep it as int64, tensor\.long\(\), .*persistent=False"),
        (torch.complex64, "with torch.view_as_real"),
    ],
)
def test_each_type_that_cannot_be_sent_has_its_own_advice(dtype: torch.dtype, fix: str) -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("other", torch.zeros(3).to(dtype))
    with pytest.raises(ValueError, match=f"tensor 'other' is {dtype}: only float32 and int64 can be sent; .*{fix}"):
        schema_of(model.state_dict())
    # The advice is true: float() makes the floating-point types float32 and leaves all others.
    converted = model.float().state_dict()["other"].dtype
    assert (converted == torch.float32) == dtype.is_floating_point
