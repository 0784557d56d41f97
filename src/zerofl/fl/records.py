"""What is recorded of each client's update, of each round, and of a whole run: one type and one JSON object each."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, NamedTuple, Self, TypedDict, TypeVar

N = TypeVar("N", int, float)

MB = 1e6  # bytes

FORMAT = 1
"""The form of the JSON objects, in each of them as `format`. Those of version 0.1.0 do not say it."""


class Kind(NamedTuple):
    """What a value in JSON must be, in a test and in words."""

    holds: Callable[[Any], bool]
    words: str


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _or_null(kind: Kind) -> Kind:
    return Kind(lambda value: value is None or kind.holds(value), f"{kind.words}, or null")


def _each(holds: Callable[[Any], bool], words: str) -> Kind:
    return Kind(lambda value: type(value) is dict and all(map(holds, value.values())), words)


COUNT = Kind(_is_count, "a whole number of 0 or more")
POSITIVE = Kind(lambda value: _is_number(value) and value > 0, "a positive number")
NUMBER = Kind(_is_number, "a number")
SHARE = Kind(lambda value: _is_number(value) and 0 <= value <= 1, "a number in [0, 1]")
TEXT = Kind(lambda value: type(value) is str, "a text")
COUNTS = Kind(lambda value: type(value) is list and all(map(_is_count, value)), "whole numbers")
NUMBERS = _each(_is_number, "a number for each layer")
TEXTS = _each(lambda value: type(value) is str, "a text for each")
FLOPS = Kind(lambda value: NUMBERS.holds(value) and {"dense", "sparse"} <= value.keys(), "numbers dense and sparse")
CODE = _each(
    lambda value: type(value) is str or (type(value) is list and all(type(v) is str for v in value)),
    "a text, or texts, for each",
)
FAILURES = Kind(
    lambda value: (
        type(value) is list
        and all(type(v) is dict and _is_count(v.get("client")) and type(v.get("cause")) is str for v in value)
    ),
    "a client and a cause for each",
)


def _of(kind: Kind, *, key: str = "", default: Any = MISSING) -> Any:
    """A field that is `kind` in JSON, under `key` if that is not its name; one with a default may be absent there."""
    return field(default=default, metadata={"kind": kind, "key": key})


def _may_be(kind: Kind) -> Any:
    """A field that may be null, and absent."""
    return _of(_or_null(kind), default=None)


class _Record:
    """A frozen dataclass whose fields are made by `_of`."""

    @classmethod
    def from_json(cls, values: object) -> Self:
        """The record of a JSON object; other keys than its fields are left out.

        Raises:
            ValueError: it is none, of a later version, or a key is missing or has another kind of value; it says which.
        """
        if not isinstance(values, dict):
            raise ValueError(f"it is {type(values).__name__}, expected a JSON object")
        if (form := values.get("format", 0)) not in range(FORMAT + 1):
            raise ValueError(f"format = {form!r:.80}: this version of zerofl reads up to {FORMAT}; install a later one")
        found: dict[str, Any] = {}
        for of in fields(cls):  # type: ignore[arg-type]
            key, kind = _key(of), of.metadata["kind"]
            if key not in values:
                if of.default is MISSING:
                    raise ValueError(f"has no {key}, expected {kind.words}")
            elif not kind.holds(values[key]):
                raise ValueError(f"{key} = {values[key]!r:.80}: expected {kind.words}")
            else:
                found[of.name] = values[key]
        return cls(**found)

    def to_json(self) -> dict[str, Any]:
        """The record as a JSON object."""
        return {"format": FORMAT} | {_key(of): getattr(self, of.name) for of in fields(self)}  # type: ignore[arg-type]


def _key(of: "Field[Any]") -> str:
    return of.metadata["key"] or of.name


@dataclass(frozen=True, kw_only=True)
class ClientRecord(_Record):
    """What a client did in a round. `uplink_bytes` is the length of the payload it sent; 0 if it sent none.

    `train_loss` is the mean of a sample, the seconds are those of local training, by the clock and of all threads, the
    joules what it took as the processors counted it and as CPU seconds let one estimate it (`zerofl.fl.energy`).
    `realised_sparsity` is the zeros' share of all sparse weights in the last forward pass. A figure that the client did
    not report, or not credibly, is None. Where the server clips, `update_norm` is that of the change as it came, and
    `clip_factor` its norm after clipping over that.
    """

    round: int = _of(COUNT)
    client: int = _of(COUNT)
    uplink_bytes: int = _of(COUNT)
    examples: int = _of(COUNT, key="num-examples")
    train_loss: float | None = _may_be(NUMBER)
    train_seconds: float | None = _may_be(NUMBER)
    train_cpu_seconds: float | None = _may_be(NUMBER)
    train_joules: float | None = _may_be(NUMBER)
    train_joules_estimate: float | None = _may_be(NUMBER)
    realised_sparsity: float | None = _may_be(SHARE)
    update_norm: float | None = _may_be(NUMBER)
    clip_factor: float | None = _may_be(SHARE)

    def to_json(self) -> dict[str, Any]:
        """As of every record; the figures of clipping are left out where the server does not clip."""
        absent = {"update_norm", "clip_factor"} if self.update_norm is None else set()
        return {key: value for key, value in super().to_json().items() if key not in absent}


class FailureRecord(TypedDict):
    """A client that sent no usable update, or did not validate, and why."""

    client: int
    cause: str


@dataclass(frozen=True, kw_only=True)
class RoundRecord(_Record):
    """What happened in a round: of the clients in `clients`, those in `failures` sent no usable update.

    Losses and `realised_sparsity` are means over the clients, weighted by samples; seconds and joules of training and
    bytes are sums. `uplink_bytes` are those of usable updates, `refused_bytes` those of payloads that were none.
    `nonzero_ratio` is that of each sparse layer of the new model, `mask_overlap` how far the clients' choices agree.
    Test and validation figures are those of the new model, None where it was not evaluated; so is a loss that is not
    finite.
    """

    round: int = _of(COUNT)
    lr: float = _of(NUMBER)
    clients: Sequence[int] = _of(COUNTS)
    failures: Sequence[FailureRecord] = _of(FAILURES)
    examples: int | None = _may_be(COUNT)
    train_loss: float | None = _may_be(NUMBER)
    train_seconds: float | None = _may_be(NUMBER)
    train_cpu_seconds: float | None = _may_be(NUMBER)
    train_joules: float | None = _may_be(NUMBER)
    train_joules_estimate: float | None = _may_be(NUMBER)
    realised_sparsity: float | None = _may_be(SHARE)
    test_loss: float | None = _may_be(NUMBER)
    test_accuracy: float | None = _may_be(SHARE)
    validation_accuracy: float | None = _may_be(SHARE)
    uplink_bytes: int = _of(COUNT)
    refused_bytes: int | None = _may_be(COUNT)
    downlink_bytes: int = _of(COUNT)
    nonzero_ratio: Mapping[str, float] = _of(NUMBERS)
    mask_overlap: Mapping[str, float] | None = _may_be(NUMBERS)
    seconds: float = _of(NUMBER)

    def to_json(self) -> dict[str, Any]:
        """As of every record; figures of an evaluation that was not made are left out."""
        absent = {"test_loss", "test_accuracy"} if self.test_accuracy is None else set()
        absent |= {"validation_accuracy"} if self.validation_accuracy is None else set()
        return {key: value for key, value in super().to_json().items() if key not in absent}


@dataclass(frozen=True, kw_only=True)
class Summary(_Record):
    """The figures of a finished run; it ends with what they depend on.

    `updates` counts the usable ones, which took `uplink_bytes`; sums that the records of a version before do not have
    are None. `energy` says what the joules are and what they cover. `flops_a_sample` are those of dense training and
    of SWAT.
    """

    name: str = _of(TEXT)
    rounds: int = _of(COUNT)
    test_accuracy: float | None = _may_be(SHARE)
    test_loss: float | None = _may_be(NUMBER)
    validation_accuracy: float | None = _may_be(SHARE)
    best_test_accuracy: float | None = _may_be(SHARE)
    best_round: int | None = _may_be(COUNT)
    uplink_bytes: int = _of(POSITIVE)
    refused_bytes: int | None = _may_be(COUNT)
    downlink_bytes: int = _of(COUNT)
    updates: int = _of(POSITIVE)
    full_model_bytes: int = _of(POSITIVE)
    savings: float = _of(POSITIVE)
    failures: int = _of(COUNT)
    seconds: float = _of(NUMBER)
    train_seconds: float = _of(NUMBER)
    train_cpu_seconds: float | None = _may_be(NUMBER)
    train_joules: float | None = _may_be(NUMBER)
    train_joules_estimate: float | None = _may_be(NUMBER)
    energy: str | None = _may_be(TEXT)
    threads: int = _of(COUNT)
    kernels: str | None = _may_be(TEXT)
    machine: str = _of(TEXT)
    versions: Mapping[str, str] = _of(TEXTS)
    code: Mapping[str, str | list[str]] | None = _may_be(CODE)
    data_sha256: str | None = _may_be(TEXT)
    flops_a_sample: Mapping[str, float] | None = _may_be(FLOPS)


def savings(full_model_bytes: int, updates: int, uplink_bytes: int) -> float:
    """The paper's measure with measured bytes: what the updates would take as full models, over what they took.

    `full_model_bytes` is the model's size as its numbers are; `uplink_bytes` the length of the `updates` that were
    used.
    """
    return full_model_bytes * updates / uplink_bytes


def total(figures: Sequence[N | None]) -> N | None:
    """The sum of a figure over all records, or None if it is not known of one: some were made before it was."""
    known = [figure for figure in figures if figure is not None]
    return sum(known[1:], known[0]) if known and len(known) == len(figures) else None
