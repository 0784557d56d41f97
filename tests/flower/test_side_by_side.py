"""Clients of a round that are trained side by side in one process: faster, and no result differs by it."""

import os
import threading
from pathlib import Path

import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from tests.running import experiment_of, model_bytes, run, without_times
from zerofl.exchange.uplink import UPLINKS
from zerofl.experiment import Experiment
from zerofl.fl.client import clients_at_once
from zerofl.flower.client_app import app as client_app
from zerofl.run.folder import read_rounds


def app_that(train: "threading.Barrier | None" = None, crashing: int | None = None) -> ClientApp:
    """The real app, whose clients wait for each other, or of which one trains and then crashes."""
    app = ClientApp()
    app.evaluate()(lambda message, context: client_app(message, context))

    @app.train()
    def _(message: Message, context: Context) -> Message:
        if train:
            train.wait(timeout=60)
        reply = client_app(message, context)
        if context.node_config["partition-id"] == crashing:
            raise MemoryError("out of memory in the middle of a round")
        return reply

    return app


@pytest.mark.parametrize("uplink", UPLINKS)
def test_any_number_at_once_ends_in_the_same_weights_and_records(uplink: str, cifar_root: Path, tmp_path: Path) -> None:
    for at_once in (1, 2, 3):
        experiment = experiment_of(cifar_root, uplink=uplink, clients_at_once=at_once, topk_period=2, momentum=0.9)
        run(experiment, tmp_path / str(at_once))
    for other in ("2", "3"):
        assert model_bytes(tmp_path / other) == model_bytes(tmp_path / "1")
        assert without_times(tmp_path / other) == without_times(tmp_path / "1")


def test_they_are_trained_at_the_same_time(cifar_root: Path, tmp_path: Path) -> None:
    """Three wait until all of them are there, in each of three rounds."""
    run(experiment_of(cifar_root, clients_at_once=3), tmp_path / "run", app_that(threading.Barrier(3)))
    assert all(record.failures == [] for record in read_rounds(tmp_path / "run"))


def test_one_that_fails_leaves_the_others_and_the_next_round_as_they_are(cifar_root: Path, tmp_path: Path) -> None:
    for at_once in (1, 3):
        experiment = experiment_of(cifar_root, clients_at_once=at_once)
        run(experiment, tmp_path / str(at_once), app_that(crashing=2))
    failures = [record.failures for record in read_rounds(tmp_path / "3")]
    assert any(failures)
    assert not all(failures)
    assert model_bytes(tmp_path / "3") == model_bytes(tmp_path / "1")
    assert without_times(tmp_path / "3") == without_times(tmp_path / "1")


def test_processor_seconds_are_a_clients_own_or_not_told(cifar_root: Path, tmp_path: Path) -> None:
    for threads, at_once in ((1, 3), (2, 3), (2, 1)):
        experiment = experiment_of(cifar_root, clients_at_once=at_once, threads=threads, rounds=1)
        (record,) = read_rounds(run(experiment, tmp_path / f"{threads}-{at_once}"))
        if (threads, at_once) == (2, 3):
            assert record.train_cpu_seconds is None
        else:
            assert record.train_cpu_seconds is not None
            assert record.train_cpu_seconds > 0
        if threads == 1:  # three that share two cores wait for each other, and their own seconds do not grow by it
            assert record.train_cpu_seconds is not None
            assert record.train_seconds is not None
            assert record.train_cpu_seconds <= record.train_seconds + 0.05


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"threads": 1}, 8),
        ({"threads": 2}, 4),
        ({"threads": 3}, 2),
        ({"threads": 16}, 1),
        ({"threads": 1, "clients_per_round": 5}, 5),
        ({"threads": 1, "clients_at_once": 3}, 3),
        ({"threads": 1, "clients_at_once": 50}, 10),
        ({"threads": 0}, 1),  # as many threads as PyTorch chooses take all cores
        ({"threads": 1, "device": "cuda"}, 10),  # or as many as its memory has room for
        ({"threads": 1, "device": "cuda", "topk_period": 2}, 1),
        ({"threads": 1, "device": "cuda", "clients_at_once": 4}, 4),
    ],
)
def test_as_many_as_the_cores_have_room_for(
    values: dict[str, int | str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    assert clients_at_once(Experiment(**values)) == expected  # type: ignore[arg-type]
