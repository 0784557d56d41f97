"""The rounds of Algorithm 1, from the checkpoint to the last one, recorded as they finish."""

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch

from zerofl.data import Dataset, dataset_checksum, dataset_on, load_dataset
from zerofl.exchange.aggregate import ServerOptimizer
from zerofl.exchange.update import State
from zerofl.exchange.wire import Schema, decode_state, encode_state, schema_of
from zerofl.experiment import Experiment
from zerofl.fl.client import Validation, clients_of
from zerofl.fl.flops import training_flops
from zerofl.fl.records import RoundRecord
from zerofl.fl.server import (
    Answer,
    Failure,
    RoundError,
    ServerState,
    failure_records,
    initial_state,
    optimizer_of,
    step,
    test_model,
    weighted_mean,
)
from zerofl.fl.train import empty_model
from zerofl.rng import cohort
from zerofl.run.checkpoint import Checkpoint
from zerofl.run.files import CHECKPOINT, FIX, ResultsError
from zerofl.run.folder import finish_run, save_round
from zerofl.run.origin import code

OnRound = Callable[[RoundRecord], None]


class Clients(Protocol):
    """How the server reaches its clients.

    Both methods say to how many of them the payload went, and give an answer for each, in their order.
    """

    def train(self, model: State, payload: bytes, round: int, clients: list[int]) -> tuple[int, Iterable[Answer]]:
        """Have the clients train the model, which they get as `payload`."""

    def validate(self, payload: bytes, round: int, clients: list[int]) -> tuple[int, Iterable[Validation | Failure]]:
        """Have them try it on the samples that they hold out."""


def run_rounds(
    connect: Callable[[], Clients],
    experiment: Experiment,
    directory: Path,
    checkpoint: Checkpoint | None,
    on_round: OnRound,
) -> None:
    """Run the rounds after the checkpoint's, or all of them, and finish the run's folder.

    `connect` finds the clients, once it is known that the run can be resumed.

    Raises:
        RoundError: too few usable updates in a round.
        DatasetError: the data set is not there.
        ResultsError: it is not the data that the rounds before the checkpoint were trained on, or not their model.
    """
    torch.set_num_threads(experiment.threads)
    dataset = load_dataset(experiment.dataset, experiment.root)
    data_sha256 = dataset_checksum(experiment.dataset, experiment.root)
    state = _start(experiment, dataset, directory, checkpoint, data_sha256)
    schema = schema_of(state.model)
    now = code()["sources_sha256"]
    earlier = tuple(sources for sources in checkpoint.sources_sha256 if sources != now) if checkpoint else ()
    _, validated = clients_of(experiment)
    reach = connect()

    payload, sent = _as_sent(state.model, schema, experiment)
    with _background() as write:  # a round is written while the next one is trained
        for round in range(checkpoint.round + 1 if checkpoint else 1, experiment.rounds + 1):
            started = time.perf_counter()
            clients = cohort(experiment.seed, round, experiment.clients, experiment.clients_per_round)
            asked, answers = reach.train(sent, payload, round, clients)
            state, record, client_records = step(state, answers, experiment, dataset, round, sent)
            downlink_bytes = asked * len(payload)
            try:
                payload, sent = _as_sent(state.model, schema, experiment)
            except ValueError as error:
                raise RoundError(f"round {round}: the new model cannot be sent: {error}") from error
            evaluated = state.evaluated()
            if _is_due(experiment.evaluate_every, round, experiment):
                on_device = dataset_on(experiment.dataset, experiment.root, experiment.device)
                loss, accuracy = test_model(evaluated, on_device, experiment)
                record = replace(record, test_loss=loss, test_accuracy=accuracy)
            if _is_due(experiment.validate_every, round, experiment):
                validating = [client for client in clients if client in validated]
                shown = payload
                if evaluated is not state.model:
                    shown = encode_state(evaluated, schema, experiment.downlink_values)
                asked, validations = reach.validate(shown, round, validating)
                record = _validated(record, validations)
                downlink_bytes += asked * len(shown)
            record = replace(record, downlink_bytes=downlink_bytes, seconds=time.perf_counter() - started)
            made = Checkpoint(round, *state, data_sha256, (*earlier, now))
            due = record.nonzero_ratio if _is_due(experiment.snapshot_every, round, experiment) else ()
            kept = {name: state.model[f"{name}.weight"] for name in due}
            write(save_round, directory, record, client_records, made, kept)
            on_round(record)
    more = {"data_sha256": data_sha256, "flops_a_sample": training_flops(experiment, dataset)._asdict()}
    if earlier:  # a run that was resumed with other code than it began with
        more["code"] = code() | {"earlier_sources_sha256": list(earlier)}
    finish_run(directory, state.evaluated(), schema.dense_bytes, **more)


@contextmanager
def _background() -> Iterator[Callable[..., None]]:
    """A `write(function, *arguments)` that has one thread do it, one at a time; the end waits for the last.

    What one raises the next call raises, or the end, also after another error: a disk that is full is said.
    """
    pending: Future[object] | None = None

    def finish() -> None:
        nonlocal pending
        if pending:
            wait([pending])  # an interrupt comes here, and leaves its result to the next call
            done, pending = pending, None
            done.result()

    try:
        with ThreadPoolExecutor(1, "record") as thread:

            def write(function: Callable[..., object], *arguments: object) -> None:
                nonlocal pending
                finish()
                pending = thread.submit(function, *arguments)

            yield write
    finally:
        finish()


def _as_sent(model: State, schema: Schema, experiment: Experiment) -> tuple[bytes, State]:
    """The payload of the model, and the model as clients decode it: with float32 the same, else a rounded one."""
    payload = encode_state(model, schema, experiment.downlink_values)
    return payload, model if experiment.downlink_values == "float32" else decode_state(payload, schema)


def _is_due(every: int, round: int, experiment: Experiment) -> bool:
    """If what is done `every` so many rounds (0: never) is done in this one; after the last it is done in any case."""
    return every > 0 and (round % every == 0 or round == experiment.rounds)


def _validated(record: RoundRecord, answers: Iterable[Validation | Failure]) -> RoundRecord:
    """The record with the new model's accuracy on the clients' samples, weighted by their number."""
    found = list(answers)
    failed = [Failure(a.client, f"validation: {a.cause}") for a in found if isinstance(a, Failure)]
    accuracy = weighted_mean([(a.accuracy, a.examples) for a in found if isinstance(a, Validation)])
    failures = [*record.failures, *failure_records(failed)]
    return replace(record, validation_accuracy=accuracy, failures=failures)


def _start(
    experiment: Experiment, dataset: Dataset, directory: Path, checkpoint: Checkpoint | None, data_sha256: str
) -> ServerState:
    """The state to start from: the checkpoint's, once it is known to be of this data and this model."""
    if checkpoint is None:
        return initial_state(experiment, dataset)
    if checkpoint.data_sha256 != data_sha256:
        raise ResultsError(
            f"{directory}: its rounds 1 to {checkpoint.round} were trained on other data than is in "
            f"{experiment.root or experiment.dataset} (SHA-256 {checkpoint.data_sha256[:16]}… and "
            f"{data_sha256[:16]}…). Give the same data, or start elsewhere with --out"
        )
    model = empty_model(experiment, dataset)
    return _state_of(checkpoint, schema_of(model.state_dict()), optimizer_of(experiment, model), directory)


def _state_of(checkpoint: Checkpoint, schema: Schema, optimizer: ServerOptimizer, directory: Path) -> ServerState:
    """The model's state in its own order, and the optimiser's."""

    def described(state: State) -> dict[str, tuple[torch.Size, torch.dtype]]:
        return {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()}

    where = f"{directory / CHECKPOINT}: expected the experiment's model"
    if described(checkpoint.state) != {name: (shape, dtype) for name, shape, dtype in schema.tensors}:
        raise ResultsError(f"{where}, but its tensors have other names, shapes or types; {FIX}")
    state = {spec.name: checkpoint.state[spec.name] for spec in schema.tensors}
    if described(checkpoint.optimizer_state) != described(optimizer.init(state)):
        raise ResultsError(f"{where}, but the optimiser's tensors have other names, shapes or types; {FIX}")
    for name, tensor in (*state.items(), *checkpoint.optimizer_state.items()):
        if not tensor.isfinite().all():
            raise ResultsError(f"{where}, but {name} holds non-finite values (NaN or infinity); {FIX}")
    return ServerState(state, checkpoint.optimizer_state)
