"""What a run's final model is worth with its top-k weights, and what without the top-k (§4.3)."""

from pathlib import Path
from typing import NamedTuple

from zerofl.data import dataset_checksum, load_dataset
from zerofl.fl.train import evaluate
from zerofl.run.folder import is_finished, read_experiment, read_summary
from zerofl.run.load import load_model
from zerofl.sparse.sparsify import densify_


class Evaluation(NamedTuple):
    """Losses and accuracies, in [0, 1], on the test part: with the top-k weights, and with all of them.

    `other_data` says that the data are not those of the run's summary.
    """

    sparse_loss: float
    sparse_accuracy: float
    dense_loss: float
    dense_accuracy: float
    other_data: bool


def evaluate_run(directory: Path, root: str | None = None) -> Evaluation:
    """Evaluate the final model of a run in both ways; the first is what its summary says.

    The paper has "accuracy of 82% on the validation set will drop to 10% if the inference is done without
    sparsification" (§4.3). `root` is where the data set is now, unless it is where the run found it.

    Raises:
        ResultsError: as `zerofl.load_model`.
        DatasetError: the data set is not there.
    """
    model, experiment = load_model(directory), read_experiment(directory)
    place = experiment.dataset, experiment.root if root is None else root
    dataset = load_dataset(*place)
    recorded = read_summary(directory).data_sha256 if is_finished(directory) else None
    sparse = evaluate(model, dataset.test, dataset)
    densify_(model)
    other_data = recorded is not None and recorded != dataset_checksum(*place)
    return Evaluation(*sparse, *evaluate(model, dataset.test, dataset), other_data)
