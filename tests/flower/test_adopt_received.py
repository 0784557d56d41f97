"""Adopted apps whose updates refer to the model that each node received."""

from collections.abc import Iterable
from typing import Any

import pytest
from flwr.app import ArrayRecord, Message
from flwr.serverapp.strategy import FedAvg

from tests.flower.test_adopt import client_app, parameters, start
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


@pytest.mark.parametrize("uplink", ["full", "top_k_weights"])
def test_each_update_is_read_against_what_its_node_received(uplink: str, caplog: pytest.LogCaptureFixture) -> None:
    """With everything sent the result is the one without the uplink, and no update is left out."""
    plain = start(OwnModels(), client_app())
    adopted = start(SparseUplink(OwnModels()), client_app(uplink_mod(uplink, sparsity=0.5, mask_ratio=0.5)))
    assert "left out" not in caplog.text
    after, expected = parameters(adopted), parameters(plain)
    assert all(after[name].equal(expected[name]) for name in expected)


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
