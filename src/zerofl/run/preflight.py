"""What is checked before a run computes anything: its data, its model, its folder, its disk."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from zerofl.data import Dataset, client_indices, load_dataset
from zerofl.data.partition import held_out_count
from zerofl.experiment import Experiment, ExperimentError
from zerofl.fl.train import augmentation_of, plain_model
from zerofl.run.folder import is_finished
from zerofl.run.resume import check_free, check_run
from zerofl.run.room import check_room
from zerofl.sparse import dispatch


def preflight(
    out: Path,
    experiments: Sequence[Experiment],
    resume: bool,
    check_engine: Callable[[Experiment], None] = lambda experiment: None,
) -> list[Experiment]:
    """Raise unless all the experiments can run, each in the folder of its name below `out`; returns them settled.

    `check_engine` raises unless what carries the messages can be used for an experiment.

    Raises:
        DatasetError: a data set is not there.
        ExperimentError: as `check_fits`.
        ResultsError: a folder cannot be written or is in use, its disk is too full, or as `check_run`.
    """
    for experiment in experiments:
        check_fits(experiment, load_dataset(experiment.dataset, experiment.root))
    settled = [check_run(out / experiment.name, experiment, resume) for experiment in experiments]
    for experiment in settled:
        check_engine(experiment)
    left = [experiment for experiment in settled if not is_finished(out / experiment.name)]
    check_room(out, left)
    for experiment in left:
        check_free(out / experiment.name)
    return settled


def check_fits(experiment: Experiment, dataset: Dataset) -> None:
    """Raise unless the experiment can be run on the data set at all, before anything is trained.

    Raises:
        ExperimentError: a partition or an augmentation that the data set cannot have, nothing to train or validate
            on, images of another size than the model takes, or a device or an instruction set that is not there.
    """
    e, shape = experiment, tuple(dataset.train.images.shape[1:])
    _check_machine(e)
    if not len(dataset.test.labels):
        raise ExperimentError(f"{e.dataset}: {e.root} has no test part, on which the server evaluates; add one")
    if e.partition != "node" and not len(dataset.train.labels):
        raise ExperimentError(
            f"{e.dataset}: {e.root} has no training part, which partition = {e.partition!r} deals to the clients; add "
            "one, or in a deployment whose nodes have data of their own set partition = 'node'"
        )
    augmentation_of(e, dataset)
    try:
        parts = client_indices(e.dataset, e.root, e.partition, e.clients, e.alpha, e.seed)
    except ValueError as error:
        raise ExperimentError(f"{e.dataset}: {error}") from error
    most = max(len(part) for part in parts)
    if e.validate_every and e.partition != "node" and not held_out_count(most, e.validation_fraction):
        raise ExperimentError(
            f"validate_every = {e.validate_every}, but validation_fraction = {e.validation_fraction} "
            f"holds out none of a client's {most} samples; raise it, or set validate_every = 0"
        )
    try:
        with torch.device("meta"), torch.no_grad():
            plain_model(experiment, dataset).eval()(torch.empty(1, *shape))
    except RuntimeError as error:
        raise ExperimentError(
            f"model = {experiment.model!r} does not take images of {shape}, which {experiment.dataset} has: {error}"
        ) from error


def _check_machine(e: Experiment) -> None:
    if dispatch.REFUSED:
        raise ExperimentError(dispatch.REFUSED)
    if e.device != "cpu" and not torch.cuda.is_available():
        raise ExperimentError(
            f"device = {e.device!r}: PyTorch {torch.__version__} finds no CUDA device here; leave it at cpu, or "
            "install a PyTorch with CUDA and its driver"
        )
    if e.device != "cpu" and torch.device(e.device).index not in (None, *range(torch.cuda.device_count())):
        raise ExperimentError(f"device = {e.device!r}: this machine has {torch.cuda.device_count()} CUDA devices")
