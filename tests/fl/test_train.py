from itertools import pairwise
from pathlib import Path

import pytest
import torch

from zerofl.data import Dataset, load_dataset
from zerofl.experiment import Experiment, ExperimentError
from zerofl.fl.train import empty_model, evaluate, initial_model, learning_rate, train
from zerofl.run.preflight import check_fits
from zerofl.sparse.layers import SparseConv2d
from zerofl.sparse.sparsify import sparse_layers


def tiny(root: Path, **values: object) -> tuple[Experiment, Dataset]:
    settings: dict[str, object] = {"root": str(root), "width": 4, "sparsity": 0.8, "batch_size": 8, "rounds": 10}
    return Experiment(**(settings | values)), load_dataset("cifar10", str(root))  # type: ignore[arg-type]


def test_the_learning_rate_decays_exponentially() -> None:
    """§4.1 with t = round - 1 of T = 10: start at 0.1, a factor of 0.1 ** (1 / 10) a round."""
    rates = [learning_rate(0.1, 0.01, round, 10) for round in range(1, 12)]
    assert rates[0] == 0.1
    assert rates[10] == pytest.approx(0.01)  # T itself, which no round reaches
    for before, after in pairwise(rates):
        assert after / before == pytest.approx(0.1**0.1)


def trained(experiment: Experiment, dataset: Dataset, round: int = 1, client: int = 0) -> dict[str, torch.Tensor]:
    model = empty_model(experiment, dataset)
    initial = initial_model(experiment, dataset).state_dict()
    model.load_state_dict({name: tensor.clone() for name, tensor in initial.items()}, assign=True)
    train(model, dataset.train, dataset, experiment, round=round, client=client)
    return model.state_dict()


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_training_is_a_function_of_seed_round_and_client(cifar_root: Path) -> None:
    experiment, dataset = tiny(cifar_root, epochs=3, augment=True)
    first = trained(experiment, dataset)
    assert equal(first, trained(experiment, dataset))
    assert not equal(first, trained(experiment, dataset, round=2))
    assert not equal(first, trained(experiment, dataset, client=1))


def test_training_learns(cifar_root: Path) -> None:
    """The mean loss over ten epochs; guessing one of ten classes has log(10) = 2.30."""
    experiment, dataset = tiny(cifar_root, epochs=10)
    model = empty_model(experiment, dataset)
    initial = initial_model(experiment, dataset).state_dict()
    model.load_state_dict({name: tensor.clone() for name, tensor in initial.items()}, assign=True)
    assert train(model, dataset.train, dataset, experiment, round=1, client=0) < 2.1


def test_an_experiment_that_does_not_fit_its_data_is_refused(cifar_root: Path) -> None:
    experiment, dataset = tiny(cifar_root, clients=201, clients_per_round=1)
    with pytest.raises(
        ExperimentError, match="cifar10: clients = 201: expected 1 to 200, the number of training samples"
    ):
        check_fits(experiment, dataset)
    experiment, dataset = tiny(cifar_root, model="leaf_cnn")
    with pytest.raises(ExperimentError, match=r"'leaf_cnn' does not take images of \(3, 32, 32\), which cifar10 has"):
        check_fits(experiment, dataset)
    experiment, dataset = tiny(cifar_root, validate_every=1, validation_fraction=0.1)  # 2 samples a client
    with pytest.raises(ExperimentError, match=r"validation_fraction = 0.1 holds out none of a client's 2 samples"):
        check_fits(experiment, dataset)
    check_fits(*tiny(cifar_root))


def test_evaluate_equals_one_pass_over_everything(cifar_root: Path) -> None:
    experiment, dataset = tiny(cifar_root)
    model = empty_model(experiment, dataset)
    model.load_state_dict(initial_model(experiment, dataset).state_dict(), assign=True)
    loss, accuracy = evaluate(model, dataset.test, dataset, batch_size=7)
    logits = model.eval()(dataset.normalized(dataset.test.images))
    expected = torch.nn.functional.cross_entropy(logits, dataset.test.labels)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert accuracy == pytest.approx((logits.argmax(1) == dataset.test.labels).float().mean().item())


def test_the_initial_model_is_a_function_of_the_seed_and_leaves_the_global_state(cifar_root: Path) -> None:
    experiment, dataset = tiny(cifar_root)
    before = torch.random.get_rng_state()
    one, other = (initial_model(tiny(cifar_root, seed=seed)[0], dataset).state_dict() for seed in (1, 2))
    torch.rand(3)
    assert equal(one, initial_model(experiment, dataset).state_dict())
    assert not equal(one, other)
    torch.random.set_rng_state(before)
    initial_model(experiment, dataset)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_dense_training_swaps_no_layer(cifar_root: Path) -> None:
    experiment, dataset = tiny(cifar_root, sparsity=0.0)
    assert not list(sparse_layers(empty_model(experiment, dataset)))
    layers = dict(sparse_layers(empty_model(*tiny(cifar_root))))
    assert len(layers) == 16
    assert all(isinstance(layer, SparseConv2d) and layer.sparsity == 0.8 for layer in layers.values())


def test_bfloat16_rounds_the_products_and_keeps_the_weights(cifar_root: Path) -> None:
    """One step, because rounding moves entries into and out of the top k, and later steps go other ways from there."""
    settings = {"width": 16, "batch_size": 200}
    experiment, dataset = tiny(cifar_root, **settings)
    initial = initial_model(experiment, dataset)
    exact, rounded = (
        trained(tiny(cifar_root, **settings, precision=precision)[0], dataset) for precision in ("float32", "bfloat16")
    )
    assert [tensor.dtype for tensor in rounded.values()] == [tensor.dtype for tensor in exact.values()]
    steps = [
        torch.cat([(state[name] - parameter).flatten() for name, parameter in initial.named_parameters()])
        for state in (exact, rounded)
    ]
    assert 0.9 < torch.cosine_similarity(steps[0], steps[1], dim=0) < 0.9999
