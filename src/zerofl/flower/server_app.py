"""The server as a Flower app: it carries a round's messages over a grid to nodes, and says which client each is.

It does not use Flower's stock strategies: those draw cohorts from the global random state, sum replies in order of
arrival, turn integer counters into floats, let FedAdam optimise BatchNorm's statistics, and cannot resume.
"""

import logging
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path

from flwr.app import Context, Message, MessageType
from flwr.serverapp import Grid, ServerApp

from zerofl.data import load_dataset
from zerofl.exchange.update import State
from zerofl.exchange.uplink import UPLINKS
from zerofl.exchange.wire import Received, decode, received_model, schema_of
from zerofl.experiment import Experiment
from zerofl.fl.client import Validation, clients_of
from zerofl.fl.server import Answer, Failure, RoundError
from zerofl.fl.train import empty_model
from zerofl.flower.messages import instructions, read_payload, read_record, read_validation
from zerofl.run.checkpoint import Checkpoint
from zerofl.run.rounds import OnRound, run_rounds

FIRST_WORD_SECONDS, NEXT_WORD_SECONDS = 5, 30
"""After how long the server says that nodes are missing, and how often again."""

TTL_TIMEOUTS, LEAST_TTL_SECONDS = 2.0, 600.0
"""For how many timeouts of a reply, and how long at least, an instruction is delivered and its reply taken.

Flower's own half a day would have a node that was away train round after round that nobody waits for, before the
current one. A node whose clock is ahead of the server's by what is over loses its replies."""

_log = logging.getLogger("flwr")  # Flower's own, which `flwr run --stream` and `flwr log` show


def server_app(experiment: Experiment, directory: Path, checkpoint: Checkpoint | None, on_round: OnRound) -> ServerApp:
    """The ServerApp that runs `experiment` into `directory`, on from `checkpoint`, and reports each round's record."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        serve(grid, experiment, directory, checkpoint, on_round)

    return app


def serve(
    grid: Grid, experiment: Experiment, directory: Path, checkpoint: Checkpoint | None, on_round: OnRound
) -> None:
    """`zerofl.run.rounds.run_rounds` over a grid. Raises what that raises, and RoundError if too few nodes come."""
    run_rounds(partial(GridClients, grid, experiment), experiment, directory, checkpoint, on_round)


class GridClients:
    """The clients of an experiment behind a grid's nodes, once all are there: `zerofl.run.rounds.Clients`.

    Raises:
        RoundError: too few nodes come.
    """

    def __init__(self, grid: Grid, experiment: Experiment) -> None:
        dataset = load_dataset(experiment.dataset, experiment.root)
        self._grid, self._experiment = grid, experiment
        self._schema = schema_of(empty_model(experiment, dataset).state_dict())
        self._most_examples, _ = clients_of(experiment)
        self._nodes = wait_for_nodes(grid, experiment)

    def train(self, model: State, payload: bytes, round: int, clients: list[int]) -> tuple[int, Iterator[Answer]]:
        """The clients' updates, decoded as they are asked for, a few at a time on the cores there are.

        A client whose node is gone first gets another, if one came.
        """
        self._nodes = nodes_by_client(self._nodes, self._grid.get_node_ids(), self._experiment.clients)
        received = received_model(model, self._schema)
        asked, replies = self._exchange(MessageType.TRAIN, payload, round, clients)
        return asked, self._decoded(replies, received, round)

    def _decoded(
        self, replies: Iterable[tuple[int, Message | Failure]], received: Received, round: int
    ) -> Iterator[Answer]:
        cores = os.cpu_count() or 1
        with ThreadPoolExecutor(cores, "decode") as decoders:

            def begun() -> Iterator[Future[Answer]]:
                for client, reply in replies:
                    yield decoders.submit(self._answer, reply, received, round, client)

            waiting = begun()
            ahead = deque(islice(waiting, cores))
            while ahead:
                answer = ahead.popleft().result()
                ahead.extend(islice(waiting, 1))
                yield answer

    def validate(self, payload: bytes, round: int, clients: list[int]) -> tuple[int, Iterator[Validation | Failure]]:
        """The accuracies on what the clients hold out."""
        asked, replies = self._exchange(MessageType.EVALUATE, payload, round, clients)
        return asked, (self._validation(reply, client) for client, reply in replies)

    def _validation(self, reply: Message | Failure, client: int) -> Validation | Failure:
        try:
            return reply if isinstance(reply, Failure) else read_validation(reply, client, self._most_examples)
        except ValueError as error:
            return Failure(client, f"{type(error).__name__}: {error}")

    def _answer(self, reply: Message | Failure, received: Received, round: int, client: int) -> Answer:
        """What a client sent, or why it is none; the bytes of a payload that is none count as refused."""
        if isinstance(reply, Failure):
            return reply
        payload = b""
        try:
            payload = read_payload(reply)
            record = read_record(reply, round, client, len(payload), self._most_examples)
            update = decode(payload, self._schema, received)
            if update.adds != (adds := UPLINKS[self._experiment.uplink].adds):
                kinds = {False: "weights", True: "changes"}
                raise ValueError(f"the update holds {kinds[update.adds]}, the experiment's uplink sends {kinds[adds]}")
        except ValueError as error:
            return Failure(client, f"{type(error).__name__}: {error}", len(payload))
        return update, record

    def _exchange(
        self, message_type: str, payload: bytes, round: int, clients: list[int]
    ) -> tuple[int, list[tuple[int, Message | Failure]]]:
        """Send the model to the clients whose nodes are there; returns how many these are, and each client's reply, or
        why it gave none, in client order."""
        nodes, timeout = self._nodes, self._experiment.reply_timeout_seconds
        found: dict[int, Message | Failure] = {
            client: Failure(client, f"no reply within {timeout:g} s" if client in nodes else "its node is gone")
            for client in clients
        }
        there = [client for client in clients if client in nodes]
        client_of = {nodes[client]: client for client in there}
        contents = instructions(payload, self._experiment, round, there)
        ttl = max(TTL_TIMEOUTS * timeout, LEAST_TTL_SECONDS)
        messages = [
            Message(content, nodes[client], message_type, group_id=str(round), ttl=ttl)
            for client, content in zip(there, contents, strict=True)
        ]
        for reply in self._grid.send_and_receive(messages, timeout=timeout):
            client = client_of.pop(reply.metadata.src_node_id, None)
            if client is None:
                continue  # from nobody who was asked, or a second one
            if reply.has_error():
                found[client] = Failure(client, str(reply.error.reason or f"error {reply.error.code}"))
            else:
                found[client] = reply
        return len(there), sorted(found.items())


def wait_for_nodes(grid: Grid, experiment: Experiment) -> dict[int, int]:
    """A node id for every client, once so many are there: on Ray and in a deployment they come up beside the server.

    Raises:
        RoundError: they do not come within `reply_timeout_seconds`.
    """
    started = time.monotonic()
    deadline, next_word = started + experiment.reply_timeout_seconds, started + FIRST_WORD_SECONDS
    while len(nodes := nodes_by_client({}, grid.get_node_ids(), experiment.clients)) < experiment.clients:
        if time.monotonic() > deadline:
            raise RoundError(
                f"the experiment has {experiment.clients} clients, but only {len(nodes)} nodes came within "
                f"{experiment.reply_timeout_seconds:g} s; {_more_nodes(len(nodes), experiment)}"
            )
        if time.monotonic() > next_word:
            _log.warning(
                "waiting for nodes: %d of %d are there, a node for each client; %s",
                len(nodes), experiment.clients, _more_nodes(len(nodes), experiment),
            )  # fmt: skip
            next_word = time.monotonic() + NEXT_WORD_SECONDS
        time.sleep(0.1)
    return nodes


def _more_nodes(there: int, experiment: Experiment) -> str:
    """What to do about nodes that are not there."""
    clients = experiment.clients
    # As many as leave something of their replies, and as the partition can be dealt to.
    may_be_fewer = there > 2 * experiment.trim_clients and experiment.partition != "natural"
    fewer = f"clients={there} clients_per_round={min(there, experiment.clients_per_round)}"
    if experiment.min_replies > there:
        fewer += f" min_replies={there}"
    return (
        f"in a simulation, flwr run with --federation-config 'num-supernodes={clients}'; in a deployment, start "
        f"{clients - there} more SuperNodes"
        + (f"; or in a new run set {fewer} in the run config" if may_be_fewer else "")
    )


def nodes_by_client(before: Mapping[int, int], node_ids: Iterable[int], clients: int) -> dict[int, int]:
    """The node that is each client, of those that are there. An instruction tells a node which client it is to be.

    A node stays the client that it was `before`; a client whose node is gone gets one of those that have newly come, in
    the order of their ids, and is left out where there is none.
    """
    there = set(node_ids)
    nodes = {client: node for client, node in before.items() if node in there}
    new = sorted(there - set(nodes.values()))
    vacant = (client for client in range(clients) if client not in nodes)
    return dict(sorted((nodes | dict(zip(vacant, new, strict=False))).items()))
