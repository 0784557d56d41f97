"""How a payload, an experiment and a client's figures travel in a Flower message."""

import dataclasses
from typing import NamedTuple

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from zerofl.experiment import Experiment, make_experiment
from zerofl.fl.client import Validation
from zerofl.fl.records import ClientRecord

# A serialisation type of our own: Flower chunks it like any array, and its strategies refuse it loudly instead of
# averaging the bytes. Their error names the type and nothing else, so it says what to do. It is part of the protocol:
# with other words an older client or server no longer finds the payload, so it stays as it is.
PAYLOAD_STYPE = "zerofl.payload: put zerofl.flower.SparseUplink around all other strategies, privacy's too"


class Instruction(NamedTuple):
    """What a client is asked: to be `client` of `experiment` in `round`, with the model in `payload`."""

    payload: bytes
    experiment: Experiment
    round: int
    client: int


def instructions(payload: bytes, experiment: Experiment, round: int, clients: list[int]) -> list[RecordDict]:
    """What the server sends each of the clients to train or to evaluate. They share the model's bytes."""
    model, settings = payload_record(payload), ConfigRecord(dataclasses.asdict(experiment))
    return [
        RecordDict({"model": model, "experiment": settings, "round": ConfigRecord({"round": round, "client": client})})
        for client in clients
    ]


def read_instruction(message: Message) -> Instruction:
    """The instruction in a message, on the client."""
    records = message.content.config_records
    experiment, place = make_experiment(dict(records["experiment"])), records["round"]
    round, client = place["round"], place["client"]
    assert isinstance(round, int)
    assert isinstance(client, int)
    return Instruction(_payload(message.content.array_records["model"]), experiment, round, client)


def train_reply(payload: bytes, record: ClientRecord) -> RecordDict:
    """What a client answers after training: its update and its figures."""
    figures = {key: value for key in CLIENT_FIGURES if (value := getattr(record, key)) is not None}
    metrics = MetricRecord({"num-examples": record.examples, **figures})
    return RecordDict({"update": payload_record(payload), "metrics": metrics})


def read_payload(message: Message) -> bytes:
    """The payload of a reply.

    Raises:
        ValueError: the reply does not hold exactly one payload.
    """
    records = list(message.content.array_records.values())
    if len(records) != 1:
        raise ValueError(f"the reply holds {len(records)} array records, expected one with the payload")
    return _payload(records[0])


def read_record(message: Message, round: int, client: int, uplink_bytes: int, most_examples: int) -> ClientRecord:
    """What a client says that it did, beside a payload of `uplink_bytes`.

    Raises:
        ValueError: as `_read_metrics`.
    """
    examples, metrics = _read_metrics(message, most_examples)
    figures = {key: _figure(metrics, key) for key in CLIENT_FIGURES}
    return ClientRecord(round=round, client=client, uplink_bytes=uplink_bytes, examples=examples, **figures)


def validation_reply(validation: Validation, loss: float) -> RecordDict:
    """What a client answers after evaluating."""
    figures = {"num-examples": validation.examples, "loss": loss, "accuracy": validation.accuracy or 0.0}
    return RecordDict({"metrics": MetricRecord(dict(figures))})


def read_validation(message: Message, client: int, most_examples: int) -> Validation:
    """A client's accuracy on what it holds out.

    Raises:
        ValueError: as `_read_metrics`.
    """
    examples, metrics = _read_metrics(message, most_examples)
    return Validation(client, examples, _figure(metrics, "accuracy"))


_AMOUNTS = ("train_loss", "train_seconds", "train_cpu_seconds", "train_joules", "train_joules_estimate")
CLIENT_FIGURES = (*_AMOUNTS, "realised_sparsity")

# What a client reports beside its update is as little to be trusted: a figure above these, or below 0, is none.
_LARGEST = dict.fromkeys(_AMOUNTS, 1e9) | dict.fromkeys(("realised_sparsity", "accuracy"), 1.0)


def _figure(metrics: dict[str, float], key: str) -> float | None:
    value = metrics.get(key)
    return value if value is not None and 0 <= value <= _LARGEST[key] else None


def _read_metrics(message: Message, most_examples: int) -> tuple[int, dict[str, float]]:
    """The number of examples in a reply, from 1 to what any client can have, and all its scalar figures.

    Raises:
        ValueError: the reply does not hold exactly one record of figures, or no such number of examples.
    """
    records = list(message.content.metric_records.values())
    if len(records) != 1:
        raise ValueError(f"the reply holds {len(records)} metric records, expected one")
    metrics = {key: value for key, value in records[0].items() if isinstance(value, (int, float))}
    examples = metrics.get("num-examples")
    if not isinstance(examples, int) or not 1 <= examples <= most_examples:
        raise ValueError(f"num-examples is {examples!r}, expected a whole number from 1 to {most_examples}")
    return examples, metrics


def payload_record(payload: bytes) -> ArrayRecord:
    """A payload as the one array of a record."""
    return ArrayRecord({"payload": bytes_array(payload, PAYLOAD_STYPE)})


def bytes_array(data: bytes, stype: str) -> Array:
    """Bytes as one of Flower's arrays, of a serialisation type of ours."""
    return Array(dtype="uint8", shape=(len(data),), stype=stype, data=data)


def _payload(record: ArrayRecord) -> bytes:
    arrays = list(record.values())
    if len(arrays) != 1 or arrays[0].stype != PAYLOAD_STYPE:
        stypes = [array.stype for array in arrays]
        raise ValueError(f"the array record holds {stypes}, expected one array with a ZeroFL payload")
    return arrays[0].data
