"""Nodes that are missing, late, or gone."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message

from tests.running import experiment_of, run
from zerofl.experiment import Experiment
from zerofl.fl.server import RoundError
from zerofl.flower.client_app import app as client_app
from zerofl.flower.engines import FIRST_CLIENT_NODE_ID, InProcessGrid
from zerofl.flower.server_app import nodes_by_client, serve, wait_for_nodes
from zerofl.run.folder import read_lines
from zerofl.run.resume import check_run, open_run


def test_a_diverged_server_model_stops_the_run(cifar_root: Path, tmp_path: Path) -> None:
    experiment = experiment_of(cifar_root, server_optimizer="fedadam", server_lr=1e38)
    with pytest.raises(RoundError, match=r"round \d: the new model cannot be sent: tensor .* holds non-finite values"):
        run(experiment, tmp_path / "run")


def test_too_few_nodes_stop_the_run(cifar_root: Path, tmp_path: Path) -> None:
    experiment = experiment_of(cifar_root, reply_timeout_seconds=0.1)
    checkpoint = open_run(tmp_path, experiment)
    with pytest.raises(RoundError, match="has 5 clients, but only 3 nodes came within 0.1 s; .*'num-supernodes=5'"):
        serve(InProcessGrid(client_app, 3), experiment, tmp_path, checkpoint, lambda record: None)


def test_fewer_nodes_than_replies_are_a_setting_too(cifar_root: Path, tmp_path: Path) -> None:
    """What the error says to set is taken, in the folder that it left."""
    experiment = experiment_of(cifar_root, rounds=1, clients_per_round=5, min_replies=4, reply_timeout_seconds=0.1)
    open_run(tmp_path, experiment)
    with pytest.raises(
        RoundError, match=r"or in a new run set clients=3 clients_per_round=3 min_replies=3 in the run config"
    ):
        serve(InProcessGrid(client_app, 3), experiment, tmp_path, None, lambda record: None)
    fewer = dataclasses.replace(experiment, clients=3, clients_per_round=3, min_replies=3)
    open_run(tmp_path, check_run(tmp_path, fewer, resume=False))
    serve(InProcessGrid(client_app, 3), fewer, tmp_path, None, lambda record: None)
    assert (tmp_path / "summary.json").exists()


@pytest.mark.parametrize("values", [{"uplink": "full", "min_replies": 3, "trim_clients": 1}, {"partition": "natural"}])
def test_fewer_clients_than_can_be_are_no_setting(values: dict[str, Any]) -> None:
    """As many as would be trimmed, or other clients than the data set's own."""
    experiment = Experiment(clients=5, clients_per_round=5, reply_timeout_seconds=0.1, **values)
    with pytest.raises(RoundError, match="start 3 more SuperNodes$"):
        wait_for_nodes(InProcessGrid(client_app, 2), experiment)


@pytest.mark.parametrize(("timeout", "expected"), [(50_000.0, 100_000.0), (60.0, 600.0)])
def test_an_instruction_is_delivered_for_two_timeouts_and_ten_minutes_at_least(
    timeout: float, expected: float, cifar_root: Path, tmp_path: Path
) -> None:
    lives: set[float] = set()

    class Grid(InProcessGrid):
        def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
            messages = list(messages)
            lives.update(message.metadata.ttl for message in messages)
            return super().send_and_receive(messages, timeout=timeout)

    experiment = experiment_of(cifar_root, rounds=1, reply_timeout_seconds=timeout)  # Flower's own is half a day
    open_run(tmp_path, experiment)
    serve(Grid(client_app, 5), experiment, tmp_path, None, lambda record: None)
    assert lives == {expected}


class Clock:
    """A `time` in which only sleeping takes time."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_nodes_that_are_missing_are_told_within_seconds(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Two of ten nodes for 40 s, then all: a word after 5 s and one 30 s later, each with what to do."""
    clock = Clock()

    class Late(InProcessGrid):
        def get_node_ids(self) -> list[int]:
            return super().get_node_ids()[: 10 if clock.now > 40 else 2]

    monkeypatch.setattr("zerofl.flower.server_app.time", clock)
    experiment = Experiment(clients=10, clients_per_round=5)
    nodes = wait_for_nodes(Late(client_app, 10), experiment)
    assert list(nodes) == list(range(10))
    words = [record.getMessage() for record in caplog.records if "waiting for nodes" in record.getMessage()]
    assert (
        words
        == [
            "waiting for nodes: 2 of 10 are there, a node for each client; in a simulation, flwr run with "
            "--federation-config 'num-supernodes=10'; in a deployment, start 8 more SuperNodes; or in a new run "
            "set clients=2 clients_per_round=2 in the run config"
        ]
        * 2
    )


def test_nodes_that_come_soon_are_no_word(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("zerofl.flower.server_app.time", Clock())
    wait_for_nodes(InProcessGrid(client_app, 10), Experiment(clients=10))
    assert "waiting for nodes" not in caplog.text


@pytest.mark.parametrize(
    ("before", "there", "expected"),
    [
        ({}, [9, 5, 7], {0: 5, 1: 7, 2: 9}),
        ({0: 5, 1: 7, 2: 9}, [9, 5], {0: 5, 2: 9}),  # gone: the others stay who they are
        ({0: 5, 2: 9}, [9, 5, 7], {0: 5, 1: 7, 2: 9}),  # and back
        ({0: 5, 1: 7, 2: 9}, [9, 5, 6, 4], {0: 5, 1: 4, 2: 9}),  # under another id
        ({}, [5, 7, 9, 11], {0: 5, 1: 7, 2: 9}),  # more nodes than clients
        ({0: 5}, [], {}),
    ],
)
def test_a_node_stays_the_client_it_is(before: dict[int, int], there: list[int], expected: dict[int, int]) -> None:
    assert nodes_by_client(before, there, 3) == expected


def test_a_client_whose_node_is_gone_is_named_and_comes_back(cifar_root: Path, tmp_path: Path) -> None:
    class Grid(InProcessGrid):
        """Its second node is away in round 2, as its first one would be named by position alone."""

        asked = 0

        def get_node_ids(self) -> list[int]:
            self.asked += 1  # once before the first round, then for each
            return [node for node in super().get_node_ids() if (self.asked, node) != (3, FIRST_CLIENT_NODE_ID + 1)]

    experiment = experiment_of(cifar_root, clients=3, clients_per_round=3, validate_every=0)
    open_run(tmp_path, experiment)
    serve(Grid(client_app, 3), experiment, tmp_path, None, lambda record: None)
    failures = [record["failures"] for record in read_lines(tmp_path / "rounds.jsonl")]
    assert failures == [[], [{"client": 1, "cause": "its node is gone"}], []]
    whole, less, _ = (record["downlink_bytes"] for record in read_lines(tmp_path / "rounds.jsonl"))
    assert 0.6 < less / whole < 0.72  # of three models two went down, each with what zeros save
    assert [c["client"] for c in read_lines(tmp_path / "clients.jsonl")] == [0, 1, 2, 0, 2, 0, 1, 2]
