"""Clients in Ray's workers, of this machine or of a cluster, while the server app stays in this process's main thread.

Flower's own simulation runs the server in a thread that an interrupt does not reach, and does not replace a worker that
was killed. So the messages go to actors of ours: an interrupt ends the run as it does in one process, and Ray makes a
killed worker anew and gives it its client again.
"""

import contextlib
import copy
import logging
import signal
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import ray
import ray.exceptions
from flwr.app import ArrayRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from zerofl.experiment import Experiment
from zerofl.flower.client_app import CLIENT_APP_RAISED_EXCEPTION
from zerofl.flower.engines import EngineError, InProcessGrid, answer, client_resources, server_context, set_identity
from zerofl.run.one import OnReply

RETRIES = 1  # of a client whose worker died: a second death is the client's own doing, and a failure


class _Worker:
    """An actor: it answers for one client after another."""

    def __init__(self, client_app: ClientApp) -> None:
        set_identity()
        self._client_app = client_app

    def ready(self) -> None:
        """Return once the worker has started."""

    def answer(self, message: Message, context: Context, names: list[str], *arrays: ArrayRecord) -> Any:
        """The reply to a message whose array records, by name, came apart; and the client's context after it."""
        message.content = RecordDict({**dict(zip(names, arrays, strict=True)), **message.content})
        return answer(self._client_app, message, context), context


class RayGrid(InProcessGrid):
    """A grid whose nodes are answered for by Ray's workers, as many at once as there are workers.

    What several messages share, the model, is put into Ray's store once.
    """

    def __init__(
        self,
        client_app: ClientApp,
        clients: int,
        resources: dict[str, float],
        workers: int,
        on_reply: OnReply | None = None,
    ) -> None:
        super().__init__(client_app, clients, on_reply=on_reply)
        actor = ray.remote(_Worker).options(max_restarts=-1, max_task_retries=RETRIES, **resources)
        # A worker has work from when it is ready on, so that one for which the cluster has no room yet delays nobody.
        started: list[Any] = [actor.remote(client_app) for _ in range(workers)]
        self._starting = {worker.ready.remote(): worker for worker in started}
        self._idle: list[Any] = []

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Deliver messages and wait for the replies."""
        return self._deliver(messages, timeout=None)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Deliver messages; returns the replies that come within `timeout` seconds, in the messages' order."""
        return list(self.pull_messages(self._deliver(messages, timeout)))

    def _deliver(self, messages: Iterable[Message], timeout: float | None) -> list[str]:
        deadline = None if timeout is None else time.monotonic() + timeout
        labelled = [(self._label(message), message) for message in messages]
        waiting, running, stored = deque(labelled), dict[Any, tuple[Any, str, Message]](), dict[int, Any]()
        while waiting or running:
            while waiting and self._idle:
                worker, (message_id, message) = self._idle.pop(), waiting.popleft()
                running[self._start(worker, message, stored)] = worker, message_id, message
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            done, _ = ray.wait([*running, *self._starting], timeout=left)
            if not done:
                break  # the deadline
            (task,) = done
            if task in self._starting:
                self._idle.append(self._starting.pop(task))
                continue
            worker, message_id, message = running.pop(task)
            self._replies[message_id] = self._result(task, message)
            self._idle.append(worker)
            if self._on_reply:
                self._on_reply(len(labelled) - len(waiting) - len(running), len(labelled))
        for worker, _, _ in running.values():  # too late: what they do is no use to anybody
            ray.kill(worker, no_restart=False)
            self._starting[worker.ready.remote()] = worker
        return [message_id for message_id, _ in labelled]

    def _start(self, worker: Any, message: Message, stored: dict[int, Any]) -> Any:
        """Have a worker answer; `stored` are the array records that are in Ray's store, by their identity here."""
        arrays = dict(message.content.array_records)
        for record in arrays.values():
            if id(record) not in stored:
                stored[id(record)] = ray.put(record)
        light = copy.copy(message)
        light.__dict__.update(message.__dict__)
        light.content = RecordDict({name: record for name, record in message.content.items() if name not in arrays})
        context = self._context(message.metadata.dst_node_id)
        return worker.answer.remote(light, context, list(arrays), *(stored[id(record)] for record in arrays.values()))

    def _result(self, task: Any, message: Message) -> Message:
        try:
            reply, context = ray.get(task)
        except ray.exceptions.RayTaskError as error:  # such as a reply that cannot be sent
            return Message(Error(CLIENT_APP_RAISED_EXCEPTION, f"{error.cause}"), reply_to=message)
        except ray.exceptions.RayError:  # whose text has process numbers, and so differs from run to run
            cause = "its worker process died, and died again when it was asked once more"
            return Message(Error(CLIENT_APP_RAISED_EXCEPTION, cause), reply_to=message)
        self._contexts[message.metadata.dst_node_id] = context
        assert isinstance(reply, Message)
        return reply


def run(server_app: ServerApp, client_app: ClientApp, experiment: Experiment, on_reply: OnReply | None = None) -> None:
    """Run the server app here and the clients in Ray's workers; `on_reply` is called after each client of an exchange.

    Raises:
        EngineError: the cluster has no room for a client.
    """
    resources = client_resources(experiment)
    with _ray(experiment.ray_address):
        workers = min(_places(resources), experiment.clients_per_round)
        grid = RayGrid(client_app, experiment.clients, resources, workers, on_reply)
        server_app(grid, server_context())


@contextlib.contextmanager
def _ray(address: str) -> Iterator[None]:
    """Ray, started here or joined at an address, and gone at the end, whatever ends it.

    "local" is a Ray of our own; without an address Ray would join whatever its files or RAY_ADDRESS name.
    """
    settings: dict[str, Any] = {"address": address} if address else {"address": "local", "include_dashboard": False}
    try:
        with _interrupts_held():
            ray.init(**settings, log_to_driver=False, logging_level=logging.ERROR)
        yield
    finally:
        with _interrupts_held():
            ray.shutdown()


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Deliver an interrupt after the block, in which Ray starts or ends: by halves it would leave processes behind.

    Ray sets a handler of SIGTERM of its own as it starts, which would end the process without a word: the one that was
    there is put back.
    """
    if threading.current_thread() is not threading.main_thread():  # which alone is interrupted
        yield
        return
    came: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, lambda number, frame: came.append(number))
    try:
        yield
    except SystemExit:  # Ray's own handler
        came.append(signal.SIGTERM)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        signal.raise_signal(came[0])


def _places(resources: dict[str, float]) -> int:
    """How many clients the cluster's machines have room for at once.

    Raises:
        EngineError: none; Ray would wait for ever for one that has.
    """
    asked = {"CPU": resources["num_cpus"], "GPU": resources["num_gpus"]}
    wanted = {kind: amount for kind, amount in asked.items() if amount}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    places = sum(int(min(node.get(kind, 0) / amount for kind, amount in wanted.items())) for node in nodes)
    if not places:
        have = ", ".join(f"{node.get('CPU', 0):g} and {node.get('GPU', 0):g}" for node in nodes)
        raise EngineError(
            f"a client takes {resources['num_cpus']:g} cores and {resources['num_gpus']:g} GPUs, and no machine of the "
            f"cluster has so many (cores and GPUs: {have}); lower client_cpus, threads or client_gpus"
        )
    return places
