"""Local training on a client (Algorithm 1, "TrainLocally") and evaluation."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from zerofl.data import Augmentation, Dataset, Split
from zerofl.data.augment import crop_and_flip
from zerofl.exchange.update import State
from zerofl.experiment import Experiment, ExperimentError
from zerofl.models import build_model, initialize_
from zerofl.rng import rng
from zerofl.sparse.sgd import SparseSGD
from zerofl.sparse.sparsify import realised_sparsity, sparse_layers, sparsify_


def learning_rate(start: float, end: float, round: int, rounds: int) -> float:
    """The rate of round 1..T: start * exp(t / T * log(end / start)), t = round - 1 as in Algorithm 1 (§4.1).

    The paper prints log(start / end), with which the rate would grow.
    """
    return start * math.exp((round - 1) / rounds * math.log(end / start))


class TrainedModel(NamedTuple):
    """A model after local training, and the mean loss of a sample in it.

    `sparse` names the sparse layers, `realised_sparsity` has the fraction of weights that each did not use at the end.
    """

    state: State
    loss: float
    sparse: list[str]
    realised_sparsity: dict[str, float]


def train_state(
    received: State, split: Split, dataset: Dataset, experiment: Experiment, *, round: int, client: int
) -> TrainedModel:
    """`train` on the received model, which is not changed."""
    model = empty_model(experiment, dataset)
    model.load_state_dict({name: tensor.clone() for name, tensor in received.items()}, assign=True)
    loss = train(model, split, dataset, experiment, round=round, client=client)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    return TrainedModel(state, loss, [name for name, _ in sparse_layers(model)], realised_sparsity(model))


def train(
    model: nn.Module, split: Split, dataset: Dataset, experiment: Experiment, *, round: int, client: int
) -> float:
    """Train `model` in place on a client's split with SGD, both on one device; returns the mean loss of a sample.

    The order of samples and the augmentation are functions of (seed, round, client). No step waits for the device.

    Raises:
        ExperimentError: the experiment augments data that have no augmentation.
    """
    augmentation = augmentation_of(experiment, dataset)
    device = next(model.parameters()).device
    order_rng, augment_rng = (rng(experiment.seed, round, client, purpose) for purpose in ("order", "augment"))
    lr = learning_rate(experiment.lr_start, experiment.lr_end, round, experiment.rounds)
    settings = lr, experiment.momentum, experiment.weight_decay
    optimizer = SparseSGD(model, *settings, scan_ahead=True, powerpropagation=experiment.powerpropagation)
    total_loss = torch.zeros((), device=device)
    model.train()
    for _ in range(experiment.epochs):
        order = torch.from_numpy(order_rng.permutation(len(split.labels))).to(device)
        for batch in torch.split(order, experiment.batch_size):
            images = split.images[batch]
            if augmentation:
                images = crop_and_flip(images, augmentation, augment_rng)
            optimizer.zero_grad()  # first: the last step's gradients need not be there beside the activations
            with torch.autocast(device.type, torch.bfloat16, enabled=experiment.precision == "bfloat16"):
                loss = F.cross_entropy(model(dataset.normalized(images)), split.labels[batch])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total_loss += loss.detach() * len(batch)
    return total_loss.item() / (experiment.epochs * len(split.labels))


@torch.no_grad()
def evaluate(model: nn.Module, split: Split, dataset: Dataset, batch_size: int = 500) -> tuple[float, float]:
    """The mean loss and the accuracy, in [0, 1], of `model` with its top-k weights (§4.3) on a split, on one device."""
    model.eval()
    device = split.labels.device
    loss = torch.zeros((), dtype=torch.float64, device=device)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    for images, target in zip(*(torch.split(t, batch_size) for t in (split.images, split.labels)), strict=True):
        logits = model(dataset.normalized(images))
        loss += F.cross_entropy(logits, target, reduction="sum")
        correct += (logits.argmax(1) == target).sum()
    return loss.item() / len(split.labels), correct.item() / len(split.labels)  # here alone a GPU is waited for


def initial_model(experiment: Experiment, dataset: Dataset) -> nn.Module:
    """The dense model the server starts from, a function of the seed alone; the global random state stays as it was."""
    seed = int(rng(experiment.seed, 0, 0, "initialization").integers(2**63))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = plain_model(experiment, dataset)
    initialize_(model, experiment.initialization, experiment.sparsity, seed, experiment.sparsity_distribution)
    return model


def empty_model(experiment: Experiment, dataset: Dataset) -> nn.Module:
    """The sparse model without storage (on the meta device): give it a state with `load_state_dict(..., assign=True)`.

    A new one for every client costs nothing, and no threshold or counter of a client reaches the next.
    """
    return sparse_model(experiment, len(dataset.classes), dataset.train.images.shape[1])


def sparse_model(experiment: Experiment, classes: int, in_channels: int) -> nn.Module:
    """`empty_model` without the data set, of which it needs these two numbers."""
    with torch.device("meta"):
        model = build_model(experiment.model, classes, in_channels, experiment.width)
    if experiment.sparsity > 0 or experiment.activation_sparsity:
        sparsify_(
            model,
            experiment.sparsity,
            activation_sparsity=experiment.activation_sparsity,
            distribution=experiment.sparsity_distribution,
            topk_period=experiment.topk_period,
            storage=experiment.storage,
        )
    return model


def augmentation_of(experiment: Experiment, dataset: Dataset) -> Augmentation | None:
    """How training images are changed; raises ExperimentError if they cannot be and the experiment wants it."""
    if experiment.augment and dataset.augmentation is None:
        raise ExperimentError(
            f"augment = true: {experiment.dataset} has no pictures that could be cropped and mirrored; "
            "set augment = false"
        )
    return dataset.augmentation if experiment.augment else None


def plain_model(experiment: Experiment, dataset: Dataset) -> nn.Module:
    """The dense model of the experiment for the data set's images and classes, on the default device."""
    return build_model(experiment.model, len(dataset.classes), dataset.train.images.shape[1], experiment.width)
