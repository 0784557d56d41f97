"""What a report takes from a run's folder, checked before it is used, so that a damaged file is named."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from zerofl.exchange.uplink import State
from zerofl.run.folder import ResultsError

FIX = "restore the file, or move the run's folder away and run it again"


class Kind(NamedTuple):
    """What a value must be, in a test and in words."""

    holds: Callable[[Any], bool]
    words: str


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


COUNT = Kind(lambda value: type(value) is int and value >= 0, "a whole number of 0 or more")
POSITIVE = Kind(lambda value: _is_number(value) and value > 0, "a positive number")
NUMBER = Kind(_is_number, "a number")
COUNT_OR_NULL = Kind(lambda value: value is None or COUNT.holds(value), "a whole number of 0 or more, or null")
NUMBER_OR_NULL = Kind(lambda value: value is None or _is_number(value), "a number or null")
SHARE_OR_NULL = Kind(
    lambda value: value is None or (_is_number(value) and 0 <= value <= 1), "a number in [0, 1] or null"
)
NUMBERS = Kind(lambda value: type(value) is dict and all(map(_is_number, value.values())), "a number for each layer")
TEXT = Kind(lambda value: type(value) is str, "a text")
TEXTS = Kind(lambda value: type(value) is dict and all(type(v) is str for v in value.values()), "a text for each")
FLOPS = Kind(lambda value: NUMBERS.holds(value) and {"dense", "sparse"} <= value.keys(), "numbers dense and sparse")

ROUND = {"round": COUNT, "nonzero_ratio": NUMBERS}
ROUND_IF_THERE = {
    "examples": COUNT,
    "train_loss": NUMBER_OR_NULL,
    "train_seconds": NUMBER_OR_NULL,
    "train_cpu_seconds": NUMBER_OR_NULL,
    "uplink_bytes": COUNT,
    "refused_bytes": COUNT,
    "downlink_bytes": COUNT,
    "realised_sparsity": SHARE_OR_NULL,
    "test_accuracy": SHARE_OR_NULL,
    "validation_accuracy": SHARE_OR_NULL,
    "mask_overlap": NUMBERS,
}
SUMMARY = {
    "name": TEXT,
    "rounds": COUNT,
    "uplink_bytes": POSITIVE,
    "downlink_bytes": COUNT,
    "updates": POSITIVE,
    "full_model_bytes": POSITIVE,
    "threads": COUNT,
    "machine": TEXT,
    "versions": TEXTS,
}
SUMMARY_IF_THERE = {
    "test_accuracy": SHARE_OR_NULL,
    "best_test_accuracy": SHARE_OR_NULL,
    "validation_accuracy": SHARE_OR_NULL,
    "refused_bytes": COUNT_OR_NULL,
    "code": TEXTS,
    "data_sha256": TEXT,
    "flops_a_sample": FLOPS,
}


def check_rounds(records: list[dict[str, Any]], where: str) -> None:
    """Whether these are records of rounds, all with the same layers.

    Raises:
        ResultsError: one is not; it says which line of the file `where`, and which key.
    """
    for number, record in enumerate(records, start=1):
        line = f"{where}, line {number}"
        _check(record, ROUND, ROUND_IF_THERE, line)
        if record["round"] != number:
            raise ResultsError(f"{line}: expected round {number}, found round {record['round']}; {FIX}")
        if record["nonzero_ratio"].keys() != records[0]["nonzero_ratio"].keys():
            raise ResultsError(f"{line}: nonzero_ratio has other layers than on line 1; {FIX}")


def check_summary(summary: Mapping[str, Any], rounds: int, name: str, where: str) -> None:
    """Whether this is the summary of the finished run of this name and number of recorded rounds.

    Raises:
        ResultsError: it is not; it says which key of the file `where`.
    """
    _check(summary, SUMMARY, SUMMARY_IF_THERE, where)
    if (summary["name"], summary["rounds"]) != (name, rounds):
        raise ResultsError(
            f"{where}: it is of {summary['rounds']} rounds of {summary['name']!r}, and the folder has {rounds} of "
            f"{name!r}; {FIX}"
        )


def check_snapshots(snapshots: Mapping[int, State], where: str) -> None:
    """Whether the kept weights of all rounds are numbers, and of the same layers.

    Raises:
        ResultsError: they are not; it says which layer of which round in the folder `where`.
    """
    first = next(iter(snapshots.values()), {})
    for round, state in snapshots.items():
        if other := sorted(first.keys() ^ state.keys()):
            raise ResultsError(f"{where}, round {round}: {other[0]} is not in every round; {FIX}")
        for name, weights in state.items():
            if weights.shape != first[name].shape:
                shapes = f"{tuple(weights.shape)}, expected {tuple(first[name].shape)} as in the first round"
                raise ResultsError(f"{where}, round {round}: {name} has shape {shapes}; {FIX}")
            if not weights.isfinite().all():
                raise ResultsError(f"{where}, round {round}: {name} has weights that are no numbers; {FIX}")


def _check(record: Mapping[str, Any], required: Mapping[str, Kind], if_there: Mapping[str, Kind], where: str) -> None:
    for key, kind in {**required, **if_there}.items():
        if key not in record:
            if key in required:
                raise ResultsError(f"{where}: has no {key}, expected {kind.words}; {FIX}")
        elif not kind.holds(record[key]):
            raise ResultsError(f"{where}: {key} = {record[key]!r:.80}: expected {kind.words}; {FIX}")
