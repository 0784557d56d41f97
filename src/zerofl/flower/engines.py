"""What carries the messages between the same two apps: this process itself, or Ray."""

import importlib.util
import os
import socket
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import count, repeat
from pathlib import Path
from typing import Protocol

import torch
from flwr.app import Context, Error, Message, RecordDict, UserConfig
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from zerofl.errors import ZeroFLError, install_hint
from zerofl.experiment import Experiment
from zerofl.fl.client import clients_at_once
from zerofl.flower.client_app import CLIENT_APP_RAISED_EXCEPTION, SIDE_BY_SIDE
from zerofl.flower.client_app import app as client_app
from zerofl.flower.server_app import server_app
from zerofl.run.checkpoint import Checkpoint
from zerofl.run.one import OnReply, Rounds
from zerofl.run.rounds import OnRound

CONNECT_SECONDS = 10
RUN_ID, SERVER_NODE_ID, FIRST_CLIENT_NODE_ID = 1, 1, 2


class Engine(Protocol):
    """Runs the server app to its end; its exceptions come through.

    `on_reply` is called after each reply.
    """

    def __call__(
        self, server_app: ServerApp, client_app: ClientApp, experiment: Experiment, on_reply: OnReply | None = None
    ) -> None: ...


class EngineError(ZeroFLError):
    """An engine that cannot be used here; the message says what it needs."""


class InProcessGrid(Grid):
    """A Flower grid whose nodes live in this process and answer at once, `at_once` of them side by side.

    Faster to start than Ray, and without a copy of each message. Two spots are not Flower's public API:
    a message's id, and the ids that must be set before a Message can be made.
    """

    def __init__(
        self,
        client_app: ClientApp,
        clients: int,
        run_config: UserConfig | None = None,
        on_reply: OnReply | None = None,
        at_once: int = 1,
    ) -> None:
        set_identity()
        self._threads = ThreadPoolExecutor(at_once, "client") if at_once > 1 else None
        self._client_app = client_app
        self._clients = clients
        self._run_config = run_config or {}
        self._on_reply = on_reply
        self._contexts: dict[int, Context] = {}
        self._replies: dict[str, Message] = {}
        self._message_ids = count(1)
        self._run = Run.create_empty(RUN_ID)

    def set_run(self, run: Run) -> None:
        """Take over what is known of the run."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Make a message, as `Message(...)` does."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """A node for each client, in client order."""
        return list(range(FIRST_CLIENT_NODE_ID, FIRST_CLIENT_NODE_ID + self._clients))

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Deliver messages; all are answered before it returns."""
        messages = list(messages)
        for message in messages:
            message.content = _own(message.content)
        message_ids = [self._label(message) for message in messages]
        contexts = [self._context(message.metadata.dst_node_id) for message in messages]
        answered = (self._threads.map if self._threads else map)(answer, repeat(self._client_app), messages, contexts)
        for replies, (message_id, reply) in enumerate(zip(message_ids, answered, strict=True), start=1):
            self._replies[message_id] = reply
            if self._on_reply:
                self._on_reply(replies, len(messages))
        return message_ids

    def close(self) -> None:
        """Let the threads go; clients that have not begun are not trained any more."""
        if self._threads:
            self._threads.shutdown(cancel_futures=True)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies to these messages, once."""
        return [self._replies.pop(message_id) for message_id in message_ids if message_id in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Deliver messages and return the replies, in the messages' order."""
        return self.pull_messages(self.push_messages(messages))

    def _label(self, message: Message) -> str:
        """Give a message its id, which is returned."""
        message_id = str(next(self._message_ids))
        message.metadata.__dict__["_message_id"] = message_id
        return message_id

    def _context(self, node_id: int) -> Context:
        """A node's context, made when it is first asked for."""
        if node_id not in self._contexts:
            config: UserConfig = {"partition-id": node_id - FIRST_CLIENT_NODE_ID, "num-partitions": self._clients}
            if self._threads:
                config[SIDE_BY_SIDE] = True
            self._contexts[node_id] = Context(RUN_ID, node_id, config, RecordDict(), self._run_config)
        return self._contexts[node_id]


def _own(content: RecordDict) -> RecordDict:
    """Records of a node's own, as on every engine of Flower: its app may empty them. The arrays' bytes are shared."""
    # Each kind takes what one of its own holds.
    return RecordDict({key: type(record)(dict(record)) for key, record in content.items()})  # type: ignore[arg-type]


def answer(client_app: ClientApp, message: Message, context: Context) -> Message:
    """The client app's reply; its failure is an answer too, as on every engine of Flower."""
    try:
        reply = client_app(message, context)
        if not isinstance(reply, Message):
            raise TypeError(f"the client app returned {type(reply).__name__}, expected a Message")
        return reply
    except Exception as error:
        return Message(Error(CLIENT_APP_RAISED_EXCEPTION, f"{type(error).__name__}: {error}"), reply_to=message)


def set_identity() -> None:
    """Set the ids without which this process cannot make a Message."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN_ID, SERVER_NODE_ID, 0


def server_context() -> Context:
    """The server app's context."""
    return Context(RUN_ID, SERVER_NODE_ID, {}, RecordDict(), {})


def check_engine(engine: str, experiment: Experiment) -> None:
    """Raise unless an engine can be used here for an experiment, before anything is started.

    Raises:
        EngineError: the nodes would have no data of their own; Ray is not installed; or a client would need more cores
            than this machine has, or a GPU that it does not ask for.
    """
    e = experiment
    if e.partition == "node":
        raise EngineError(
            "partition = 'node': here all clients share one folder, so no node has data of its own; use 'lda' or "
            "'natural', or start the nodes as docs/deployment.md says"
        )
    if engine != "ray":
        return
    if importlib.util.find_spec("ray") is None:
        raise EngineError(f"the engine ray needs Ray, which is not installed: {install_hint('ray')}")
    if e.ray_address:
        _check_address(e.ray_address)
    elif (cpus := client_resources(e)["num_cpus"]) > (cores := os.cpu_count() or 1):
        raise EngineError(
            f"threads = {e.threads}, client_cpus = {e.client_cpus:g}: each client on Ray takes {cpus:g} cores, and "
            f"this machine has {cores}"
        )
    if not e.ray_address and e.client_gpus > (gpus := torch.cuda.device_count()):
        raise EngineError(f"client_gpus = {e.client_gpus:g}: this machine has {gpus} GPUs; lower it, or leave it at 0")
    if e.device not in ("cpu", "cuda", "cuda:0"):
        raise EngineError(f"device = {e.device!r}: Ray gives each client its GPU, which is cuda there; set device=cuda")
    if e.device != "cpu" and not e.client_gpus:
        raise EngineError(
            f"device = {e.device!r}: Ray hides the GPUs from clients that ask for none; set client_gpus, for example "
            "0.25 for four clients on each GPU"
        )


def run_in_process(
    server_app: ServerApp, client_app: ClientApp, experiment: Experiment, on_reply: OnReply | None = None
) -> None:
    """Run both apps in this process; `on_reply` is called after each client of an exchange."""
    grid = InProcessGrid(client_app, experiment.clients, on_reply=on_reply, at_once=clients_at_once(experiment))
    try:
        server_app(grid, server_context())
    finally:
        grid.close()


def run_on_ray(
    server_app: ServerApp, client_app: ClientApp, experiment: Experiment, on_reply: OnReply | None = None
) -> None:
    """Run the server app in this process and the clients in Ray's workers, here or on the cluster at `ray_address`.

    Raises:
        EngineError: as `check_engine`; or the cluster is not there, or has no room for a client.
    """
    check_engine("ray", experiment)
    from zerofl.flower import on_ray  # only now: Ray need not be installed

    on_ray.run(server_app, client_app, experiment, on_reply)


def _check_address(address: str) -> None:
    """Raise unless a Ray cluster answers at host:port. Ray itself would try for minutes, or for ever."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise EngineError(f"ray_address = {address!r}: expected host:port, for example 10.0.0.1:6379")
    try:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise EngineError(f"ray_address = {address!r}: no Ray cluster answers there: {error}") from error
    check = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        healthy = subprocess.run(check, capture_output=True, timeout=2 * CONNECT_SECONDS).returncode == 0
    except subprocess.TimeoutExpired:
        healthy = False
    if not healthy:
        raise EngineError(f"ray_address = {address!r}: something answers there, but it is no Ray cluster in health")


def client_resources(experiment: Experiment) -> dict[str, float]:
    """The cores and GPUs that Ray keeps for a client."""
    return {"num_cpus": experiment.client_cpus or experiment.threads, "num_gpus": experiment.client_gpus}


def rounds_on(engine: Engine) -> Rounds:
    """The rounds of an experiment with its messages carried by an engine, for `zerofl.run.one.run_one`."""

    def rounds(
        experiment: Experiment, directory: Path, checkpoint: Checkpoint | None, on_round: OnRound, on_reply: OnReply
    ) -> None:
        engine(server_app(experiment, directory, checkpoint, on_round), client_app, experiment, on_reply)

    return rounds


ENGINES: dict[str, Engine] = {"in-process": run_in_process, "ray": run_on_ray}
