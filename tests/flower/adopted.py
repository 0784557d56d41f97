"""Flower apps that are adopted in the tests beside it: models, training, and what was refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg, Strategy
from torch import nn

from zerofl.flower import SparseUplink, uplink_mod
from zerofl.flower.engines import InProcessGrid

CLIENTS = 3

Train = Callable[[ArrayRecord, int], ArrayRecord]


class Tied(nn.Module):
    """A language model in small: the decoder's weight is the encoder's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Embedding(12, 8)
        self.hidden = nn.Linear(8, 8)
        self.decoder = nn.Linear(8, 12)
        self.decoder.weight = self.encoder.weight

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.decoder(torch.tanh(self.hidden(self.encoder(words))))  # type: ignore[no-any-return]


def train_tied(arrays: ArrayRecord, client: int) -> ArrayRecord:
    model = Tied()
    model.load_state_dict(arrays.to_torch_state_dict())
    words = torch.randint(0, 12, (32,), generator=torch.Generator().manual_seed(client))
    nn.functional.cross_entropy(model(words), words).backward()  # type: ignore[no-untyped-call]
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    return ArrayRecord(model.state_dict())


def start(strategy: Strategy, arrays: ArrayRecord, train: Train, mod: Any, rounds: int = 2) -> ArrayRecord:
    app = ClientApp(mods=[mod])

    @app.train()
    def _train(message: Message, context: Context) -> Message:
        (received,) = message.content.array_records.values()
        metrics = MetricRecord({"num-examples": 1 + int(context.node_config["partition-id"])})
        trained = train(received, int(context.node_config["partition-id"]))
        return Message(RecordDict({"arrays": trained, "metrics": metrics}), reply_to=message)

    @app.evaluate()
    def _evaluate(message: Message, context: Context) -> Message:
        return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1})}), reply_to=message)

    return strategy.start(InProcessGrid(app, CLIENTS), arrays, num_rounds=rounds).arrays


def refusals(caplog: pytest.LogCaptureFixture, arrays: ArrayRecord, train: Train, **settings: Any) -> str:
    """What the clients answered, all of them, with the mod before that training."""
    start(SparseUplink(FedAvg()), arrays, train, uplink_mod(**({"sparsity": 0.9} | settings)), rounds=1)
    assert "Received 0 results and 3 failures" in caplog.text
    return caplog.text
