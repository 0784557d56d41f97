"""How a payload, an experiment and a client's figures lie in a Flower message."""

import dataclasses
from typing import NamedTuple

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from zerofl.experiment import Experiment, make_experiment

# A serialisation type of our own: Flower chunks it like any array, and its strategies refuse it loudly instead of
# averaging the bytes. Their error names the type and nothing else, so this says what to do.
PAYLOAD_STYPE = "zerofl.payload: put zerofl.flower.SparseUplink around all other strategies, privacy's too"


class Instruction(NamedTuple):
    """What a client is told: to be `client` of `experiment` in `round`, with the model in `payload`."""

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


def train_reply(payload: bytes, metrics: dict[str, int | float]) -> RecordDict:
    """What a client answers after training: its update and its figures."""
    return RecordDict({"update": payload_record(payload), "metrics": MetricRecord(dict(metrics))})


def read_payload(message: Message) -> bytes:
    """The payload of a reply.

    Raises:
        ValueError: the reply does not hold exactly one payload.
    """
    records = list(message.content.array_records.values())
    if len(records) != 1:
        raise ValueError(f"the reply holds {len(records)} array records, expected one with the payload")
    return _payload(records[0])


def read_metrics(message: Message, most_examples: int) -> dict[str, float]:
    """The scalar figures of a reply, with `num-examples`, a whole number from 1 to what any client can have.

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
    return metrics


def payload_record(payload: bytes) -> ArrayRecord:
    """A payload as the one array of a record."""
    array = Array(dtype="uint8", shape=(len(payload),), stype=PAYLOAD_STYPE, data=payload)
    return ArrayRecord({"payload": array})


def _payload(record: ArrayRecord) -> bytes:
    arrays = list(record.values())
    if len(arrays) != 1 or arrays[0].stype != PAYLOAD_STYPE:
        stypes = [array.stype for array in arrays]
        raise ValueError(f"the array record holds {stypes}, expected one array with a ZeroFL payload")
    return arrays[0].data
