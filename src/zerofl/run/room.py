"""How much room the results of runs take on their disk."""

import errno
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from zerofl.data import load_dataset
from zerofl.experiment import Experiment
from zerofl.fl.train import empty_model
from zerofl.run.files import CHECKPOINT, CLIENTS, MODEL, ROUNDS, SNAPSHOTS, ResultsError
from zerofl.sparse.sparsify import sparse_layers

# Generous: a line of rounds.jsonl is about 2 kB with ResNet-18's 16 layers, one of clients.jsonl 200 bytes.
ROUND_BYTES, CLIENT_BYTES = 4_000, 400
STATES = {"fedavg": 1, "fedavgm": 2, "fedadam": 3, "fedadam_sparse": 3}
"""Models in a checkpoint: the state, FedAvgM's moment, FedAdam's two; with `average_decay` one more."""


OWN_FILES = (ROUNDS, CLIENTS, CHECKPOINT, MODEL, f"{SNAPSHOTS}/*", "*.tmp/*", f"{SNAPSHOTS}/*.tmp/*")
"""What a run that is resumed has on the disk already. Those in .tmp folders, half written, go when it starts."""

FIXES = {
    errno.ENOSPC: "Make room",
    errno.EDQUOT: "Make room: your quota is used up",
    errno.EFBIG: "Raise the limit of a file's size (ulimit -f)",
    errno.EACCES: "Give yourself the right to write there (chmod, chown)",
    errno.EPERM: "Give yourself the right to write there (chmod, chown)",
    errno.EROFS: "Make that disk writable",
    errno.EMFILE: "Raise the limit of open files (ulimit -n)",
    errno.ENFILE: "Raise the machine's limit of open files",
    errno.ENAMETOOLONG: "Choose a shorter name or folder",
}


def fix_of(error: OSError) -> str:
    """What to do about an error of the system, as the beginning of a sentence."""
    return FIXES.get(error.errno or 0, "See to that")


class Room(NamedTuple):
    """The bytes that a run leaves behind, and those that it takes beside them while it runs."""

    kept: int
    passing: int


def room_of(experiment: Experiment) -> Room:
    """What a run takes on disk, at most."""
    e = experiment
    model = empty_model(e, load_dataset(e.dataset, e.root))
    model_bytes = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    sparse_bytes = sum(layer.weight.numel() * layer.weight.element_size() for _, layer in sparse_layers(model))
    snapshots = e.rounds // e.snapshot_every + 1 if e.snapshot_every else 0
    records = e.rounds * (ROUND_BYTES + e.clients_per_round * CLIENT_BYTES)
    states = STATES[e.server_optimizer] + (e.average_decay > 0)
    # A new checkpoint is written whole before the old one goes.
    return Room(model_bytes + snapshots * sparse_bytes + records, 2 * states * model_bytes)


def check_room(out: Path, experiments: Sequence[Experiment]) -> None:
    """Make the folder `out`, and see that runs of the experiments, one after another, can be written there.

    Raises:
        ResultsError: it cannot be written, or its disk has less room than they take beyond what is there of them.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out) as file:
            file.write(b"0")
    except OSError as error:
        raise ResultsError(f"{out}: results cannot be written there: {error}. {fix_of(error)}") from error
    needed = kept = 0
    for experiment in experiments:
        room, there = room_of(experiment), _bytes_there(out / experiment.name)
        needed = max(needed, kept + room.kept + room.passing - there)
        kept += room.kept - there
    if (free := shutil.disk_usage(out).free) < needed:
        raise ResultsError(
            f"{out}: its disk has {free / 1e6:,.0f} MB left, and the runs take up to {needed / 1e6:,.0f} MB; "
            "make room, or write elsewhere"
        )


def _bytes_there(directory: Path) -> int:
    """What a run's own files take."""
    total = 0
    for path in (path for pattern in OWN_FILES for path in directory.glob(pattern)):
        with suppress(FileNotFoundError):  # another process has just renamed it: only one of them will get the folder
            total += path.stat().st_size if path.is_file() else 0
    return total
