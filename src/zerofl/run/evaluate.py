"""What a run's final model is worth with its top-k weights, and what without the top-k (§4.3)."""

from pathlib import Path
from typing import NamedTuple

from zerofl.data import load_dataset
from zerofl.fl.train import evaluate
from zerofl.run.folder import read_experiment
from zerofl.run.load import load_model
from zerofl.sparse.sparsify import densify_


class Evaluation(NamedTuple):
    """Losses and accuracies, in [0, 1], on the test part: with the top-k weights, and with all of them."""

    sparse_loss: float
    sparse_accuracy: float
    dense_loss: float
    dense_accuracy: float


def evaluate_run(directory: Path, root: str | None = None) -> Evaluation:
    """Evaluate the final model of a run in both ways; the first is what its summary says.

    The paper has "accuracy of 82% on the validation set will drop to 10% if the inference is done without
    sparsification" (§4.3). `root` is where the data set is now, unless it is where the run found it.

    Raises:
        ResultsError: as `zerofl.load_model`.
        DatasetError: the data set is not there.
    """
    model, experiment = load_model(directory), read_experiment(directory)
    dataset = load_dataset(experiment.dataset, experiment.root if root is None else root)
    sparse = evaluate(model, dataset.test, dataset)
    densify_(model)
    return Evaluation(*sparse, *evaluate(model, dataset.test, dataset))
