"""Adopted apps whose updates refer to the model that each node received."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from tests.flower.test_adopt import client_app, parameters, start
from zerofl.exchange.uplink import UPLINKS
from zerofl.exchange.wire import decode, schema_of
from zerofl.exchange.wire.reader import WireError
from zerofl.flower import SparseUplink, uplink_mod
from zerofl.flower.messages import read_payload


class OwnModels(FedAvg):
    """Sends every other node half of the model."""

    def configure_train(self, server_round: int, arrays: ArrayRecord, *arguments: Any) -> Iterable[Message]:
        messages = list(super().configure_train(server_round, arrays, *arguments))
        halved = {name: t / 2 if t.is_floating_point() else t for name, t in arrays.to_torch_state_dict().items()}
        others = list(super().configure_train(server_round, ArrayRecord(halved), *arguments))
        nodes = sorted(message.metadata.dst_node_id for message in messages)
        own = {message.metadata.dst_node_id: message for message in messages}
        half = {message.metadata.dst_node_id: message for message in others}
        return [(half if number % 2 else own)[node] for number, node in enumerate(nodes)]


@pytest.mark.parametrize("downlink_values", [None, "float32"])
@pytest.mark.parametrize("uplink", UPLINKS)
def test_each_update_is_read_against_what_its_node_received(
    uplink: str, downlink_values: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """With everything sent the result is the one without the uplink, and no update is left out."""
    plain = start(OwnModels(), client_app())
    strategy = SparseUplink(OwnModels(), downlink_values=downlink_values)
    adopted = start(strategy, client_app(uplink_mod(uplink, sparsity=0.5, mask_ratio=1.0)))
    assert "left out" not in caplog.text
    torch.testing.assert_close(parameters(adopted), parameters(plain), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("uplink", UPLINKS)
def test_a_change_is_clipped_from_what_its_node_received(uplink: str, caplog: pytest.LogCaptureFixture) -> None:
    """Clients that change nothing are none to clip, whichever model they got."""
    caplog.set_level("INFO", "flwr")
    app = ClientApp(mods=[uplink_mod(uplink, sparsity=0.5, mask_ratio=0.5)])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        (arrays,) = message.content.array_records.values()
        content = RecordDict({"arrays": ArrayRecord(dict(arrays)), "metrics": MetricRecord({"num-examples": 1})})
        return Message(content, reply_to=message)

    strategy = SparseUplink(OwnModels(fraction_evaluate=0.0), clip_norm=1e-6)
    start(strategy, app, rounds=1)
    assert strategy.uplink_bytes[1] > 0
    assert "clipped" not in caplog.text


def test_a_node_that_was_sent_no_model_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    class Forgets(SparseUplink):
        def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
            self._sent.pop(min(self._sent))
            return super().aggregate_train(server_round, replies)

    start(Forgets(FedAvg()), client_app(uplink_mod("full", sparsity=0.5)), rounds=1)
    assert caplog.text.count("is left out: it was sent no model in this round") == 1


def test_an_app_may_empty_the_arrays_that_it_got(caplog: pytest.LogCaptureFixture) -> None:
    app = ClientApp(mods=[uplink_mod("full", sparsity=0.5)])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        state = message.content.array_records["arrays"].to_torch_state_dict(keep_input=False)
        content = RecordDict({"arrays": ArrayRecord(state), "metrics": MetricRecord({"num-examples": 1})})
        return Message(content, reply_to=message)

    strategy = SparseUplink(FedAvg(fraction_evaluate=0.0))
    start(strategy, app, rounds=1)
    assert "Received 4 results and 0 failures" in caplog.text


def test_what_came_up_refers_to_what_went_down() -> None:
    payloads: list[bytes] = []

    class Watched(SparseUplink):
        def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
            replies = list(replies)
            payloads.extend(read_payload(reply) for reply in replies)
            return super().aggregate_train(server_round, replies)

    result = start(Watched(FedAvg()), client_app(uplink_mod("top_k_weights", sparsity=0.5, mask_ratio=0.2)))
    schema = schema_of(result.arrays.to_torch_state_dict())
    assert len(payloads) == 8
    for payload in payloads:
        with pytest.raises(WireError, match="refers to the model that the client received"):
            decode(payload, schema)
