"""What carries the messages between the same two apps: this process itself, or Ray."""

import importlib.util
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Protocol

import torch
from flwr.app import Context, Error, Message, RecordDict, UserConfig
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from zerofl.experiment import Experiment
from zerofl.extras import install_hint
from zerofl.flower.client_app import CLIENT_APP_RAISED_EXCEPTION

CONNECT_SECONDS = 10
RUN_ID, SERVER_NODE_ID, FIRST_CLIENT_NODE_ID = 1, 1, 2

OnReply = Callable[[int, int], None]
"""(replies, clients): so many of the clients that were asked have replied."""


class Engine(Protocol):
    """Runs the server app to its end; its exceptions come through.

    `on_reply` is called after each reply where the engine hears of it: in this process, not on Ray.
    """

    def __call__(
        self, server_app: ServerApp, client_app: ClientApp, experiment: Experiment, on_reply: OnReply | None = None
    ) -> None: ...


class EngineError(Exception):
    """An engine that cannot be used here; the message says what it needs."""


class InProcessGrid(Grid):
    """A Flower grid whose nodes live in this process and answer at once, one after another.

    Faster to start than Ray, and without a copy of each message. Two spots are not Flower's public API:
    a message's id, and the ids that must be set before a Message can be made.
    """

    def __init__(
        self,
        client_app: ClientApp,
        clients: int,
        run_config: UserConfig | None = None,
        on_reply: OnReply | None = None,
    ) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN_ID, SERVER_NODE_ID, 0
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
        """Deliver messages; each is answered before the next one is delivered."""
        messages, message_ids = list(messages), []
        for message in messages:
            message_id = str(next(self._message_ids))
            message.metadata.__dict__["_message_id"] = message_id
            self._replies[message_id] = self._answer(message)
            message_ids.append(message_id)
            if self._on_reply:
                self._on_reply(len(message_ids), len(messages))
        return message_ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies to these messages, once."""
        return [self._replies.pop(message_id) for message_id in message_ids if message_id in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Deliver messages and return the replies, in the messages' order."""
        return self.pull_messages(self.push_messages(messages))

    def _answer(self, message: Message) -> Message:
        node_id = message.metadata.dst_node_id
        if node_id not in self._contexts:
            config: UserConfig = {"partition-id": node_id - FIRST_CLIENT_NODE_ID, "num-partitions": self._clients}
            self._contexts[node_id] = Context(RUN_ID, node_id, config, RecordDict(), self._run_config)
        try:
            reply = self._client_app(message, self._contexts[node_id])
            if not isinstance(reply, Message):
                raise TypeError(f"the client app returned {type(reply).__name__}, expected a Message")
            return reply
        except Exception as error:  # as every engine of Flower does: a client's failure is an answer
            return Message(Error(CLIENT_APP_RAISED_EXCEPTION, f"{type(error).__name__}: {error}"), reply_to=message)


def check_engine(engine: str, experiment: Experiment) -> None:
    """Whether an engine can be used here for an experiment, before anything is started.

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
    elif (cpus := _client_resources(e)["num_cpus"]) > (cores := os.cpu_count() or 1):
        raise EngineError(
            f"threads = {e.threads}, client_cpus = {e.client_cpus:g}: each client on Ray takes {cpus:g} cores, and "
            f"this machine has {cores}"
        )
    if not e.ray_address and e.client_gpus > (gpus := torch.cuda.device_count()):
        raise EngineError(f"client_gpus = {e.client_gpus:g}: this machine has {gpus} GPUs; lower it, or leave it at 0")
    if e.device != "cpu" and not e.client_gpus:
        raise EngineError(
            f"device = {e.device!r}: Ray hides the GPUs from clients that ask for none; set client_gpus, for example "
            "0.25 for four clients on each GPU"
        )


def run_in_process(
    server_app: ServerApp, client_app: ClientApp, experiment: Experiment, on_reply: OnReply | None = None
) -> None:
    """Run both apps in this process; `on_reply` is called after each client of an exchange."""
    grid = InProcessGrid(client_app, experiment.clients, on_reply=on_reply)
    server_app(grid, Context(RUN_ID, SERVER_NODE_ID, {}, RecordDict(), {}))


def run_on_ray(
    server_app: ServerApp, client_app: ClientApp, experiment: Experiment, on_reply: OnReply | None = None
) -> None:
    """Run the server app in this process and the clients in Ray's workers, here or on the cluster at `ray_address`.

    Raises:
        EngineError: as `check_engine`; or the cluster is not there, or has no room for a client.
    """
    check_engine("ray", experiment)
    from flwr.simulation import run_simulation

    resources = _client_resources(experiment)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    with _ray(experiment.ray_address, resources):
        run_simulation(
            server_app,
            client_app,
            num_supernodes=experiment.clients,
            backend_config={"client_resources": resources},  # type: ignore[dict-item]
        )


def _check_address(address: str) -> None:
    """Whether a Ray cluster answers at host:port. Ray itself would try for minutes, or for ever."""
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


def _client_resources(experiment: Experiment) -> dict[str, float]:
    return {"num_cpus": experiment.client_cpus or experiment.threads, "num_gpus": experiment.client_gpus}


@contextmanager
def _ray(address: str, resources: dict[str, float]) -> Iterator[None]:
    """Ray, started here or joined at an address; Flower uses the one that is there.

    Flower would wait for ever for a worker where none has room, so this is looked at first.
    """
    import ray

    settings = {"address": address} if address else {"include_dashboard": False}
    ray.init(**settings, log_to_driver=False, logging_level=logging.ERROR)
    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        wanted = {"CPU": resources["num_cpus"], "GPU": resources["num_gpus"]}
        if not any(all(node.get(kind, 0) >= amount for kind, amount in wanted.items()) for node in nodes):
            have = ", ".join(f"{node.get('CPU', 0):g} and {node.get('GPU', 0):g}" for node in nodes)
            raise EngineError(
                f"a client takes {wanted['CPU']:g} cores and {wanted['GPU']:g} GPUs, and no machine of the cluster has "
                f"so many (cores and GPUs: {have}); lower client_cpus, threads or client_gpus"
            )
        yield
    finally:
        ray.shutdown()


ENGINES: dict[str, Engine] = {"in-process": run_in_process, "ray": run_on_ray}
