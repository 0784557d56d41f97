"""What a report takes from a run's folder, checked before it is used, so that a damaged file is named."""

from collections.abc import Mapping, Sequence

from zerofl.exchange.update import State
from zerofl.fl.records import RoundRecord
from zerofl.run.files import FIX, ResultsError


def check_layers(rounds: Sequence[RoundRecord], where: str) -> None:
    """Raise unless the records of all rounds are of the same layers.

    Raises:
        ResultsError: one is not; it says which line of the file `where`.
    """
    for record in rounds:
        if record.nonzero_ratio.keys() != rounds[0].nonzero_ratio.keys():
            raise ResultsError(f"{where}, line {record.round}: nonzero_ratio has other layers than on line 1; {FIX}")


def check_snapshots(snapshots: Mapping[int, State], where: str) -> None:
    """Raise unless the kept weights of all rounds are numbers, and of the same layers.

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
