"""Adopted apps whose model goes down packed, to the bit or rounded."""

import json
import random
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg, Result, Strategy

from tests.flower.test_adopt import CLIENTS, client_app, make_model, parameters, start
from tests.flower.test_adopt_received import OwnModels
from zerofl.exchange.update import State
from zerofl.exchange.uplink import UPLINKS
from zerofl.exchange.wire import VALUES, decode_state, encode_state, schema_of
from zerofl.flower import SparseUplink, uplink_mod
from zerofl.flower.engines import InProcessGrid
from zerofl.flower.packed_model import MODEL_STYPE, packed, unpacked


class Watched(InProcessGrid):
    """Counts the bytes of the arrays in each message that goes down."""

    def __init__(self, app: ClientApp) -> None:
        super().__init__(app, CLIENTS)
        self.bytes = 0

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        messages = list(messages)
        records = [record for message in messages for record in message.content.array_records.values()]
        self.bytes += sum(len(array.data) for record in records for array in record.values())
        return super().push_messages(messages)


def begin(strategy: Strategy, app: ClientApp, state: State | None = None, rounds: int = 1) -> tuple[Result, int]:
    """What comes of it, and the bytes that went down."""
    random.seed(0)  # Flower's strategies draw the order of the clients from it
    grid = Watched(app)
    arrays = ArrayRecord(state or make_model().state_dict())
    return strategy.start(grid, arrays, num_rounds=rounds), grid.bytes


def rounded(state: State, values: str) -> State:
    schema = schema_of(state)
    return decode_state(encode_state(state, schema, values), schema)


def floats(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}


@pytest.mark.parametrize("uplink", UPLINKS)
def test_in_float32_the_weights_are_the_same_bits(uplink: str) -> None:
    mod = uplink_mod(uplink, sparsity=0.8, mask_ratio=0.1)
    plain, packing = SparseUplink(FedAvg()), SparseUplink(FedAvg(), downlink_values="float32")
    expected, _ = begin(plain, client_app(mod), rounds=3)
    result, _ = begin(packing, client_app(mod), rounds=3)
    assert all(tensor.equal(parameters(expected)[name]) for name, tensor in parameters(result).items())
    assert packing.uplink_bytes == plain.uplink_bytes
    if uplink == "top_k_weights":  # which leaves zeros in the model
        assert packing.downlink_bytes[3] < 0.6 * plain.downlink_bytes[3]


@pytest.mark.parametrize("values", ["float16", "bfloat16", "int8"])
@pytest.mark.parametrize("uplink", ["full", "diff_on_top_k_weights"])
def test_clients_train_the_rounded_model_and_what_they_changed_is_put_onto_the_servers(
    values: str, uplink: str
) -> None:
    """After a round it is w + (FedAvg's result from Q(w) - Q(w)), with all of it sent; to the rounding of the sums."""
    own = floats(make_model().state_dict())
    came = rounded(make_model().state_dict(), values)
    assert any(not came[name].equal(own[name]) for name in own)
    trained = parameters(begin(FedAvg(), client_app(), came)[0])
    expected = {name: own[name] + (trained[name] - came[name]) for name in own}
    strategy = SparseUplink(FedAvg(), downlink_values=values)
    result, _ = begin(strategy, client_app(uplink_mod(uplink, sparsity=0.5, mask_ratio=1.0)))
    torch.testing.assert_close(parameters(result), expected, atol=1e-6, rtol=1e-5)


def test_of_weights_only_those_that_were_sent_are_put_back() -> None:
    result, _ = begin(
        SparseUplink(FedAvg(), downlink_values="int8"), client_app(uplink_mod("top_k_weights", sparsity=0.9))
    )
    nonzero = int(result.arrays.to_torch_state_dict()["5.weight"].count_nonzero())
    assert nonzero <= CLIENTS * 205 < 2048  # the top 10 % of 2,048, of each client


def test_each_node_is_read_against_what_it_received(caplog: pytest.LogCaptureFixture) -> None:
    mod = uplink_mod("full", sparsity=0.5)
    start(SparseUplink(OwnModels(), downlink_values="int8"), client_app(mod))
    assert "left out" not in caplog.text
    plain = start(OwnModels(), client_app())
    packing = start(SparseUplink(OwnModels(), downlink_values="float32"), client_app(mod))
    assert all(tensor.equal(parameters(plain)[name]) for name, tensor in parameters(packing).items())


@pytest.mark.parametrize("uplink", UPLINKS)
def test_arrays_in_another_order_of_memory_are_trained_too(uplink: str, caplog: pytest.LogCaptureFixture) -> None:
    transposed = torch.randn(40, 64, generator=torch.Generator().manual_seed(0)).t()
    app = ClientApp(mods=[uplink_mod(uplink, sparsity=0.5, layers=["w"])])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        (arrays,) = message.content.array_records.values()
        trained = {"w": arrays.to_torch_state_dict()["w"] + 0.5}
        content = RecordDict({"arrays": ArrayRecord(trained), "metrics": MetricRecord({"num-examples": 1})})
        return Message(content, reply_to=message)

    strategy = SparseUplink(FedAvg(fraction_evaluate=0.0), downlink_values="int8")
    result, _ = begin(strategy, app, {"w": transposed})
    after = result.arrays.to_torch_state_dict()["w"]
    moved = after != (0 if uplink == "top_k_weights" else transposed)
    share = 1.0 if uplink == "full" else 0.5
    assert moved.float().mean() >= share  # more where several are as large as the last
    torch.testing.assert_close(after[moved], transposed[moved] + 0.5, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("values", [None, *VALUES])
def test_what_goes_down_is_counted_for_training_and_evaluation(
    values: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "flwr")
    strategy = SparseUplink(FedAvg(), downlink_values=values)
    _, size = begin(strategy, client_app(uplink_mod(sparsity=0.8)), rounds=2)
    assert sum(strategy.downlink_bytes.values()) == size
    assert begin(strategy, client_app(uplink_mod(sparsity=0.8)), rounds=2)[1] == sum(strategy.downlink_bytes.values())
    assert set(strategy.downlink_bytes) == {1, 2}
    assert caplog.text.count(f"{CLIENTS} models went down") == (0 if values is None else 8)
    if values == "int8":
        plain = SparseUplink(FedAvg())
        begin(plain, client_app(uplink_mod(sparsity=0.8)), rounds=2)
        assert 2 * size < sum(plain.downlink_bytes.values())  # of so small a model names are a part


def test_an_evaluating_app_gets_arrays_too() -> None:
    seen: list[State] = []

    def look(message: Message, context: Context, call_next: Any) -> Message:
        if message.metadata.message_type.startswith("evaluate"):
            seen.append(message.content.array_records["arrays"].to_torch_state_dict())
        return call_next(message, context)  # type: ignore[no-any-return]

    app = client_app(uplink_mod("full", sparsity=0.5), look)
    result, _ = begin(SparseUplink(FedAvg(), downlink_values="int8"), app)
    expected = rounded(result.arrays.to_torch_state_dict(), "int8")
    assert len(seen) == CLIENTS
    assert all(state[name].equal(tensor) for state in seen for name, tensor in expected.items())


def test_a_client_without_the_mod_says_what_to_do(caplog: pytest.LogCaptureFixture) -> None:
    begin(SparseUplink(FedAvg(), downlink_values="int8"), client_app())
    assert "needs ClientApp(mods=[zerofl.flower.uplink_mod(...), ...])" in caplog.text


def test_a_model_that_cannot_be_packed_is_told_with_its_round() -> None:
    state = make_model().state_dict()
    state["3.weight"][0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"round 1: the model cannot be sent packed: .*3\.weight.*NaN"):
        begin(SparseUplink(FedAvg(), downlink_values="int8"), client_app(), state)


@pytest.mark.parametrize("values", ["int4", 8, True, ["int8"]])
def test_unknown_values_are_refused(values: Any) -> None:
    with pytest.raises(ValueError, match="downlink_values = .*: expected None or of .*'int8'"):
        SparseUplink(FedAvg(), downlink_values=values)


def array(data: bytes) -> Array:
    return Array(dtype="uint8", shape=(len(data),), stype=MODEL_STYPE, data=data)


LINE = ["w", [2, 3], "float32"]
MALFORMED = {
    "no JSON": b"{", "no list": b"3", "no text": b"\xff", "deep": b"[" * 100_000, "a short line": b'[["w", [2]]]',
    "a name twice": json.dumps([LINE, LINE]).encode(), "a number for a name": b'[[3, [2], "float32"]]',
    "another type": b'[["w", [2], "float64"]]', "a list for a type": b'[["w", [2], ["float32"]]]',
    "a negative size": b'[["w", [-2], "float32"]]', "half a size": b'[["w", [2.5], "float32"]]',
    "a shape that is none": b'[["w", 2, "float32"]]', "too many dimensions": b'[["w", [%s1], "int64"]]' % (b"1," * 64),
    "too many entries": b'[["w", [65536, 65536], "int64"]]', "none of too many": b'[["w", [65536, 65536, 0], "int64"]]',
    "text for a line": b'["abc"]', "text for a shape": b'[["w", "", "int64"]]', "a truth": b'[["w", [true], "int64"]]',
}  # fmt: skip


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_schema_is_told(kind: str) -> None:
    with pytest.raises(ValueError, match="the packed model's schema is malformed: "):
        unpacked(ArrayRecord({"schema": array(MALFORMED[kind]), "model": array(b"")}))


def test_a_few_bytes_do_not_become_a_model_of_gigabytes() -> None:
    state = {"w": torch.zeros(4_000_000)}  # 16 MB, which a few bytes may stand for
    record, came = packed(ArrayRecord(state), "float32")
    assert len(record["model"].data) < 1000
    assert came["w"].equal(state["w"])
    larger = ArrayRecord({"schema": array(b'[["w", [2000000000], "float32"]]'), "model": record["model"]})
    with pytest.raises(ValueError, match=r"would take 8000001000 bytes, and has \d+: expected at most 1000 times"):
        unpacked(larger)
    many = json.dumps([[str(i), [0], "int64"] for i in range(70_000)]).encode()
    with pytest.raises(ValueError, match="would take 70000000 bytes"):
        unpacked(ArrayRecord({"schema": array(many), "model": record["model"]}))


@pytest.mark.parametrize(
    ("state", "cause"),
    [
        ({"w": torch.zeros(16_000_000)}, "expected at most 1000 times as many; without downlink_values"),
        ({"w": torch.ones(3), "n": torch.tensor([2**60])}, "'n'.*2"),
        ({"w": torch.ones(3, dtype=torch.float64)}, "'w' is torch.float64"),
        ({"w": torch.tensor([1.0, torch.nan])}, "'w'.*NaN"),
    ],
    ids=["alike", "large counters", "float64", "NaN"],
)
def test_a_model_that_clients_would_refuse_is_not_sent(state: State, cause: str) -> None:
    with pytest.raises(ValueError, match=cause):
        packed(ArrayRecord(state), "int8")


@pytest.mark.parametrize(
    "arrays", [{}, {"model": b""}, {"schema": b"[]"}, {"schema": b"[]", "model": b"", "more": b""}]
)
def test_a_record_with_other_arrays_is_told(arrays: dict[str, bytes]) -> None:
    with pytest.raises(ValueError, match="expected schema and model"):
        unpacked(ArrayRecord({name: array(data) for name, data in arrays.items()}))


def test_a_model_of_another_schema_is_told() -> None:
    record, _ = packed(ArrayRecord({"w": torch.ones(6)}), "float32")
    with pytest.raises(ValueError, match="schema"):
        unpacked(ArrayRecord({"schema": array(json.dumps([LINE]).encode()), "model": record["model"]}))


def test_what_is_beside_the_model_comes_as_it_was() -> None:
    """The app's own configuration is in the message, and the messages of others are left alone."""
    seen: list[RecordDict] = []

    def look(message: Message, context: Context, call_next: Any) -> Message:
        seen.append(message.content)
        return call_next(message, context)  # type: ignore[no-any-return]

    app = client_app(uplink_mod("full", sparsity=0.5), look)
    begin(SparseUplink(FedAvg(), downlink_values="int8"), app)
    assert all(content.keys() == {"arrays", "config"} for content in seen)
    assert all(content.config_records["config"]["server-round"] == 1 for content in seen)
    assert len({id(content) for content in seen}) == 2 * CLIENTS
