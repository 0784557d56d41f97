"""Clients that fail, lie or attack, and grids that lose or reorder: the run names them and continues without them."""

import math
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from flwr.app import Array, ArrayRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from tests.running import experiment_of, model_bytes, run, without_times
from zerofl.exchange.uplink import UPLINKS
from zerofl.fl.server import RoundError
from zerofl.flower.client_app import app as client_app
from zerofl.flower.engines import FIRST_CLIENT_NODE_ID, EngineError, InProcessGrid
from zerofl.flower.messages import payload_record, read_payload
from zerofl.flower.server_app import serve
from zerofl.run.folder import read_lines, read_summary
from zerofl.run.resume import open_run

Misbehaviour = Callable[[Message, Message], Message]


def misbehaving(clients: set[int], misbehave: Misbehaviour) -> ClientApp:
    """The real client app, in which `clients` answer a training instruction as `misbehave(instruction, reply)` does."""
    app = ClientApp()
    app.evaluate()(lambda message, context: client_app(message, context))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        return misbehave(message, reply) if context.node_config["partition-id"] in clients else reply

    return app


def crash(message: Message, reply: Message) -> Message:
    raise MemoryError("out of memory")


def reply_of(payload: bytes, examples: int | float, figure: float = 1.0) -> RecordDict:
    metrics = MetricRecord({"num-examples": examples, "train_loss": figure, "train_seconds": figure})
    return RecordDict({"update": payload_record(payload), "metrics": metrics})


def with_payload(change: Callable[[bytes], bytes]) -> Misbehaviour:
    return lambda message, reply: Message(
        reply_of(change(read_payload(reply)), 10),
        reply_to=message,
    )


def with_examples(examples: int | float) -> Misbehaviour:
    return lambda message, reply: Message(
        reply_of(read_payload(reply), examples),
        reply_to=message,
    )


def empty(message: Message, reply: Message) -> Message:
    return Message(RecordDict(), reply_to=message)


def numpy_array(message: Message, reply: Message) -> Message:
    arrays = ArrayRecord({"w": Array(torch.zeros(3).numpy())})
    return Message(RecordDict({"a": arrays, "m": MetricRecord({"num-examples": 1})}), reply_to=message)


def refuse(message: Message, reply: Message) -> Message:
    return Message(Error(0, "no battery"), reply_to=message)


def wordless(message: Message, reply: Message) -> Message:
    return Message(Error(0, 12345), reply_to=message)  # type: ignore[arg-type]


def nothing(message: Message, reply: Message) -> Message:
    return None  # type: ignore[return-value]


NAN = b"\x00\x00\xc0\x7f"
MISBEHAVIOURS = {
    "crash": (crash, "MemoryError: out of memory"),
    "error reply": (refuse, "no battery"),
    "a reason that is no text": (wordless, "12345"),
    "no message": (nothing, "TypeError: the client app returned NoneType, expected a Message"),
    "empty reply": (empty, "the reply holds 0 array records"),
    "a numpy array": (numpy_array, "expected one array with a ZeroFL payload"),
    "garbage": (with_payload(lambda payload: b"garbage" * 100), "WireError: the payload starts with b'garb'"),
    "truncated": (with_payload(lambda payload: payload[:-10]), "WireError: the payload ends within tensor 'fc.bias'"),
    "NaN": (with_payload(lambda payload: payload[:-4] + NAN), "WireError: tensor 'fc.bias' holds 1 non-finite values"),
    "another kind": (
        with_payload(lambda payload: payload[:4] + bytes([payload[4] & 2]) + payload[5:]),
        "the update holds weights, the experiment's uplink sends changes",
    ),
    "another round's": (
        with_payload(lambda payload: payload[:4] + b"\x03" + payload[5:13] + bytes(4) + payload[17:]),
        "WireError: the update refers to a received model of checksum 00000000, the one here has ",
    ),
    "no samples": (with_examples(0), "num-examples is 0"),
    "fractional samples": (with_examples(0.5), "num-examples is 0.5"),
    "absurd samples": (with_examples(2**40), "num-examples is 1099511627776, expected a whole number from 1 to 40"),
    "more samples than it can have": (with_examples(41), "num-examples is 41, expected a whole number from 1 to 40"),
}


@pytest.mark.parametrize("name", MISBEHAVIOURS)
def test_a_bad_client_is_named_and_left_out(name: str, cifar_root: Path, tmp_path: Path) -> None:
    """The run ends as one in which the client's data is all there is missing: the others' average."""
    misbehave, cause = MISBEHAVIOURS[name]
    experiment = experiment_of(cifar_root, rounds=1, clients_per_round=5, validate_every=0)
    run(experiment, tmp_path / "run", misbehaving({1, 3}, misbehave))
    (record,) = read_lines(tmp_path / "run" / "rounds.jsonl")
    assert record["clients"] == [0, 1, 2, 3, 4]
    assert [failure["client"] for failure in record["failures"]] == [1, 3]
    assert all(cause in failure["cause"] for failure in record["failures"])
    summary = read_summary(tmp_path / "run")
    assert summary.failures == 2
    # What was refused has its own count: the figures of an update are those of the three that were used.
    used = [c["uplink_bytes"] for c in read_lines(tmp_path / "run" / "clients.jsonl")]
    assert record["uplink_bytes"] == summary.uplink_bytes == sum(used)
    assert summary.savings == pytest.approx(3 * summary.full_model_bytes / sum(used))
    assert record["refused_bytes"] == summary.refused_bytes
    if name == "garbage":
        assert record["refused_bytes"] == 2 * 700
    if name == "crash":
        assert record["refused_bytes"] == 0
    assert [c["client"] for c in read_lines(tmp_path / "run" / "clients.jsonl")] == [0, 2, 4]
    run(experiment, tmp_path / "crashed", misbehaving({1, 3}, crash))
    assert model_bytes(tmp_path / "run") == model_bytes(tmp_path / "crashed")


class PartlyDeafGrid(InProcessGrid):
    """A grid on which the nodes of some clients never get a training instruction, and so never answer."""

    def __init__(self, client_app: ClientApp, clients: int, deaf: set[int]) -> None:
        super().__init__(client_app, clients)
        self._deaf = {FIRST_CLIENT_NODE_ID + client for client in deaf}

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        return super().push_messages(
            m for m in messages if m.metadata.message_type != "train" or m.metadata.dst_node_id not in self._deaf
        )


@pytest.mark.parametrize("uplink", UPLINKS)
def test_three_of_ten_bad_clients_leave_the_weights_of_a_run_without_them(
    uplink: str, cifar_root: Path, tmp_path: Path
) -> None:
    experiment = experiment_of(cifar_root, clients=10, clients_per_round=10, rounds=2, uplink=uplink, validate_every=0)

    def serve_on(name: str, app: ClientApp, deaf: set[int]) -> Path:
        directory = tmp_path / name
        grid = PartlyDeafGrid(app, 10, deaf)
        serve(grid, experiment, directory, open_run(directory, experiment), on_round=lambda record: None)
        return directory

    garbage, nan = MISBEHAVIOURS["garbage"][0], MISBEHAVIOURS["NaN"][0]

    def misbehave(message: Message, reply: Message) -> Message:
        first = message.metadata.dst_node_id == FIRST_CLIENT_NODE_ID + 2
        return garbage(message, reply) if first else nan(message, reply)

    attacked = serve_on("attacked", misbehaving({2, 5}, misbehave), deaf={7})
    without = serve_on("without", client_app, deaf={2, 5, 7})
    assert model_bytes(attacked) == model_bytes(without)
    for record in read_lines(attacked / "rounds.jsonl"):
        causes = {failure["client"]: failure["cause"] for failure in record["failures"]}
        assert causes[2].startswith("WireError: the payload starts with b'garb'")
        assert causes[5].startswith("WireError: tensor 'fc.bias' holds 1 non-finite values")
        assert causes[7] == "no reply within 3600 s"


class ReversedGrid(InProcessGrid):
    """A grid whose replies arrive in another order than the messages went out."""

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return super().send_and_receive(messages, timeout=timeout)[::-1]


def test_the_order_in_which_replies_arrive_does_not_matter(cifar_root: Path, tmp_path: Path) -> None:
    experiment = experiment_of(cifar_root, clients_per_round=5)
    for name, grid in (("sent", InProcessGrid(client_app, 5)), ("reversed", ReversedGrid(client_app, 5))):
        directory = tmp_path / name
        serve(grid, experiment, directory, open_run(directory, experiment), on_round=lambda record: None)
    assert model_bytes(tmp_path / "sent") == model_bytes(tmp_path / "reversed")
    assert without_times(tmp_path / "sent") == without_times(tmp_path / "reversed")


@pytest.mark.parametrize("figure", [1e308, math.inf, math.nan, -1.0])
def test_absurd_figures_beside_a_good_update_are_not_taken(figure: float, cifar_root: Path, tmp_path: Path) -> None:
    def lie(message: Message, reply: Message) -> Message:
        content = reply_of(read_payload(reply), 10, figure)
        return Message(content, reply_to=message)

    run(experiment_of(cifar_root, rounds=1, clients_per_round=5), tmp_path / "run", misbehaving({1, 3}, lie))
    (record,) = read_lines(tmp_path / "run" / "rounds.jsonl")
    clients = {c["client"]: c for c in read_lines(tmp_path / "run" / "clients.jsonl")}
    assert (clients[1]["train_loss"], clients[3]["train_seconds"]) == (None, None)
    honest = [clients[client]["train_loss"] for client in (0, 2, 4)]
    assert record["train_loss"] == pytest.approx(sum(honest) / 3)
    assert read_summary(tmp_path / "run").train_seconds == sum(clients[c]["train_seconds"] for c in (0, 2, 4))


@pytest.mark.parametrize("accuracy", [1e308, 50.0, -0.1])
def test_an_absurd_validation_accuracy_is_not_taken(accuracy: float, cifar_root: Path, tmp_path: Path) -> None:
    honest = run(experiment_of(cifar_root, rounds=1), tmp_path / "honest")
    (expected,) = read_lines(honest / "rounds.jsonl")
    app = ClientApp()
    app.train()(lambda message, context: client_app(message, context))

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] != expected["clients"][0]:
            return client_app(message, context)
        metrics = MetricRecord({"num-examples": 4, "accuracy": accuracy})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    lied = run(experiment_of(cifar_root, rounds=1), tmp_path / "lied", app)
    (record,) = read_lines(lied / "rounds.jsonl")
    assert 0 <= record["validation_accuracy"] <= 1
    assert model_bytes(lied) == model_bytes(honest)


def test_a_clients_words_are_cut_and_cleaned(cifar_root: Path, tmp_path: Path) -> None:
    def ramble(message: Message, reply: Message) -> Message:
        return Message(Error(0, "\x1b[31mred\n" + "x" * 10**6), reply_to=message)

    run(experiment_of(cifar_root, rounds=1, clients_per_round=5), tmp_path / "run", misbehaving({1}, ramble))
    (record,) = read_lines(tmp_path / "run" / "rounds.jsonl")
    cause = record["failures"][0]["cause"]
    assert cause.startswith(" [31mred xxx")
    assert len(cause) == 300


def test_ray_says_when_a_client_would_need_more_cores_than_there_are(cifar_root: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"threads = 1024, client_cpus = 0: each client on Ray takes 1024 cores"):
        run(experiment_of(cifar_root, threads=1024), tmp_path / "run", engine="ray")


def test_too_few_good_replies_stop_the_run_with_their_causes(cifar_root: Path, tmp_path: Path) -> None:
    experiment = experiment_of(cifar_root, clients_per_round=5, min_replies=4)
    with pytest.raises(RoundError) as error:
        run(experiment, tmp_path / "run", misbehaving({1, 3}, crash))
    assert "round 1: 3 of 5 clients sent a usable update, min_replies = 4 are needed" in str(error.value)
    assert str(error.value).endswith("client 1, 3: MemoryError: out of memory")
