"""A run's final model, ready to use."""

from pathlib import Path

import torch
from torch import nn

from zerofl.exchange.update import State
from zerofl.experiment import Experiment
from zerofl.fl.train import sparse_model
from zerofl.models import build_model
from zerofl.run.files import MODEL, ResultsError
from zerofl.run.folder import read_model


def load_model(run: str | Path) -> nn.Module:
    """The final model of a run: sparse as it was trained, in evaluation mode, on the CPU.

    The tensors of `model.safetensors` in the plain model are another model, which scores far less: training leaves the
    weights below the top K in the file, and evaluation does not use them (§4.3). So `sparsify_` comes before the
    weights, with the run's settings; this does both. It needs no data set: the numbers of classes and of channels are
    read from the weights.

    The model takes what the run's `Dataset.normalized` gives, float32 [N, C, H, W], and returns logits [N, classes].
    For mnist5k that is pixels in [0, 1].

    Args:
        run: a finished run's folder, for example "runs/demo/zerofl", or its `model.safetensors`, wherever it is now.

    Raises:
        ResultsError: there is no model, it is damaged or another one than its settings say, or has no settings.
    """
    file = Path(run)
    if not file.is_file():
        file = file / MODEL
    if not file.is_file():
        why = "it is not finished: resume it with --resume" if file.parent.is_dir() else "there is no such folder"
        raise ResultsError(f"{run}: expected the folder of a finished run, with {MODEL}; {why}")
    experiment, state = read_model(file)
    try:
        model = sparse_model(experiment, *_classes_and_channels(experiment, state))
        model.load_state_dict(state, assign=True)
    except (KeyError, IndexError, RuntimeError) as error:
        raise ResultsError(f"{file}: its tensors are not those of model = {experiment.model!r}: {error}") from error
    return model.eval()


def _classes_and_channels(experiment: Experiment, state: State) -> tuple[int, int]:
    """What the last linear layer gives, and what the first convolution takes."""
    with torch.device("meta"):
        modules = list(build_model(experiment.model, 1, 1, experiment.width).named_modules())
    first = next(name for name, module in modules if isinstance(module, nn.Conv2d))
    last = next(name for name, module in reversed(modules) if isinstance(module, nn.Linear))
    return state[f"{last}.weight"].shape[0], state[f"{first}.weight"].shape[1]
