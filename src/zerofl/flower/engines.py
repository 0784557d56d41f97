"""What carries the messages between the same two apps: this process itself, or Ray."""

import importlib.util
import logging
import os
from collections.abc import Callable, Iterable
from itertools import count

from flwr.app import Context, Error, Message, RecordDict, UserConfig
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from zerofl.flower.client_app import CLIENT_APP_RAISED_EXCEPTION

RUN_ID, SERVER_NODE_ID, FIRST_CLIENT_NODE_ID = 1, 1, 2

Engine = Callable[[ServerApp, ClientApp, int, int], None]
"""(server_app, client_app, clients, threads): run the server app to its end; its exceptions come through."""


class EngineError(Exception):
    """An engine that cannot be used here; the message says what it needs."""


class InProcessGrid(Grid):
    """A Flower grid whose nodes live in this process and answer at once, one after another.

    Faster to start than Ray, and without a copy of each message. Two spots are not Flower's public API:
    a message's id, and the ids that must be set before a Message can be made.
    """

    def __init__(self, client_app: ClientApp, clients: int) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN_ID, SERVER_NODE_ID, 0
        self._client_app = client_app
        self._clients = clients
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
        message_ids = []
        for message in messages:
            message_id = str(next(self._message_ids))
            message.metadata.__dict__["_message_id"] = message_id
            self._replies[message_id] = self._answer(message)
            message_ids.append(message_id)
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
            self._contexts[node_id] = Context(RUN_ID, node_id, config, RecordDict(), {})
        try:
            reply = self._client_app(message, self._contexts[node_id])
            if not isinstance(reply, Message):
                raise TypeError(f"the client app returned {type(reply).__name__}, expected a Message")
            return reply
        except Exception as error:  # as every engine of Flower does: a client's failure is an answer
            return Message(Error(CLIENT_APP_RAISED_EXCEPTION, f"{type(error).__name__}: {error}"), reply_to=message)


def check_engine(engine: str, threads: int) -> None:
    """Whether an engine can be used here, before anything is started.

    Raises:
        EngineError: Ray is not installed, or a client would need more cores than there are.
    """
    if engine != "ray":
        return
    if importlib.util.find_spec("ray") is None:
        raise EngineError("the engine ray needs Ray, which is not installed: pip install 'zerofl[ray]'")
    if threads > (cores := os.cpu_count() or 1):
        raise EngineError(f"threads = {threads}: each client on Ray takes as many cores, and this machine has {cores}")


def run_in_process(server_app: ServerApp, client_app: ClientApp, clients: int, threads: int) -> None:
    """Run both apps in this process."""
    grid = InProcessGrid(client_app, clients)
    server_app(grid, Context(RUN_ID, SERVER_NODE_ID, {}, RecordDict(), {}))


def run_on_ray(server_app: ServerApp, client_app: ClientApp, clients: int, threads: int) -> None:
    """Run the server app in this process and the clients in Ray's workers, each with `threads` cores.

    Raises:
        EngineError: as `check_engine`.
    """
    check_engine("ray", threads)
    import ray
    from flwr.simulation import run_simulation

    logging.getLogger("flwr").setLevel(logging.ERROR)
    resources: dict[str, int | float] = {"num_cpus": threads, "num_gpus": 0.0}
    init = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
    try:
        run_simulation(
            server_app,
            client_app,
            num_supernodes=clients,
            backend_config={"client_resources": resources, "init_args": init},  # type: ignore[dict-item]
        )
    finally:
        ray.shutdown()


ENGINES: dict[str, Engine] = {"in-process": run_in_process, "ray": run_on_ray}
