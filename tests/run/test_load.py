"""A run's model, loaded ready to use."""

import json
import pickle
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from tests.running import experiment_of, run
from zerofl import load_model
from zerofl.cli import main
from zerofl.data import load_dataset
from zerofl.experiment import WHERE, Experiment
from zerofl.fl.train import evaluate
from zerofl.models import LeafCNN
from zerofl.run.evaluate import evaluate_run
from zerofl.run.files import ResultsError
from zerofl.run.folder import read_experiment, read_summary
from zerofl.sparse.sparsify import sparse_layers

MODEL = "model.safetensors"


@pytest.fixture(scope="module")
def mnist_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rounds of LEAF's CNN, enough that the weights below the top K matter."""
    experiment = Experiment(
        dataset="mnist5k", model="leaf_cnn", clients=10, clients_per_round=3, rounds=2, batch_size=16,
        uplink="top_k_weights_diff", threads=1,
    )  # fmt: skip
    return run(experiment, tmp_path_factory.mktemp("mnist"))


@pytest.fixture
def cifar_run(cifar_root: Path, tmp_path: Path) -> Path:
    return run(experiment_of(cifar_root, rounds=1), tmp_path / "run")


def test_the_loaded_model_has_the_accuracy_of_the_record(mnist_run: Path) -> None:
    dataset = load_dataset("mnist5k", "")
    model, recorded = load_model(mnist_run), read_summary(mnist_run).test_accuracy
    assert not model.training
    assert [layer.sparsity for _, layer in sparse_layers(model)] == [0.95] * 3
    _, accuracy = evaluate(model, dataset.test, dataset)
    assert accuracy == recorded
    # The plain model with the same tensors is another one: this is what load_model is for.
    plain = LeafCNN(classes=10)
    plain.load_state_dict(safetensors.torch.load_file(mnist_run / MODEL))
    _, accuracy = evaluate(plain, dataset.test, dataset)
    assert accuracy < recorded - 0.1


def test_evaluated_densely_it_is_another_model(mnist_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What §4.3 says of inference without sparsification; the figures are those of the test above."""
    found, recorded = evaluate_run(mnist_run), read_summary(mnist_run)
    assert (found.sparse_accuracy, found.sparse_loss) == (recorded.test_accuracy, recorded.test_loss)
    dataset, plain = load_dataset("mnist5k", ""), LeafCNN(classes=10)
    plain.load_state_dict(safetensors.torch.load_file(mnist_run / MODEL))
    assert (found.dense_loss, found.dense_accuracy) == evaluate(plain, dataset.test, dataset)
    assert main(["evaluate", str(mnist_run)]) == 0
    printed = capsys.readouterr().out
    assert f"with the top-k weights: accuracy {found.sparse_accuracy:.2%}" in printed
    assert f"with all weights: accuracy {found.dense_accuracy:.2%}" in printed


def test_evaluated_on_other_data_it_says_so(
    cifar_run: Path, cifar_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(cifar_root, other)
    path = other / "cifar-10-batches-py" / "test_batch"
    batch = pickle.loads(path.read_bytes(), encoding="bytes")
    batch[b"data"][0, 0] ^= 1
    path.write_bytes(pickle.dumps(batch, protocol=2))
    for root, is_told in ((cifar_root, False), (other, True)):
        assert evaluate_run(cifar_run, str(root)).other_data == is_told
        assert main(["evaluate", str(cifar_run), "--root", str(root)]) == 0
        assert ("note: the data are not those of the run" in capsys.readouterr().out) == is_told


def test_it_needs_no_data_set(cifar_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three channels and ten classes, as the CIFAR fixture has them; a dense run's model is dense."""
    monkeypatch.setattr("zerofl.data.DATASETS", {})
    assert load_model(str(cifar_run))(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_a_dense_runs_model_is_dense(cifar_root: Path, tmp_path: Path) -> None:
    model = load_model(run(experiment_of(cifar_root, rounds=1, sparsity=0.0), tmp_path / "dense"))
    assert not list(sparse_layers(model))


def test_the_file_says_what_it_was_trained_with(cifar_run: Path, tmp_path: Path) -> None:
    with safe_open(cifar_run / MODEL, framework="pt") as file:
        settings = json.loads(file.metadata()["experiment"])
    assert settings == {k: v for k, v in asdict(read_experiment(cifar_run)).items() if k not in WHERE}
    alone = tmp_path / "elsewhere.safetensors"
    alone.write_bytes((cifar_run / MODEL).read_bytes())
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(load_model(alone)(images), load_model(cifar_run)(images))


def test_a_run_from_before_the_metadata_has_its_settings_beside(cifar_run: Path) -> None:
    images = torch.rand(2, 3, 32, 32)
    logits = load_model(cifar_run)(images)
    safetensors.torch.save_file(safetensors.torch.load_file(cifar_run / MODEL), cifar_run / MODEL)
    assert torch.equal(load_model(cifar_run)(images), logits)
    (cifar_run / "experiment.toml").unlink()
    with pytest.raises(ResultsError, match=r"does not say what it was trained with, and no experiment.toml is beside"):
        load_model(cifar_run)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / MODEL).unlink(), "expected the folder of a finished run.*resume it with --resume"),
        (lambda folder: (folder / MODEL).write_bytes(b"no"), "expected a run's final model, but it is damaged"),
        (lambda folder: rewrite(folder, {"experiment": "{"}), "expected a run's final model, but it is damaged"),
        (lambda folder: rewrite(folder, {"experiment": '{"model": "vgg"}'}), "model = 'vgg': expected one of"),
        (lambda folder: rewrite(folder, {"experiment": '{"model": "leaf_cnn"}'}), "not those of model = 'leaf_cnn'"),
        (lambda folder: rewrite(folder, {"experiment": '{"width": 64}'}), "not those of model = 'resnet18'"),
    ],
    ids=["unfinished", "no safetensors", "no JSON", "an unknown model", "another model", "another width"],
)
def test_what_cannot_be_loaded_is_named(damage, message: str, cifar_run: Path) -> None:  # type: ignore[no-untyped-def]
    damage(cifar_run)
    with pytest.raises(ResultsError, match=message):
        load_model(cifar_run)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="nowhere: expected the folder of a finished run.*there is no such folder"):
        load_model(tmp_path / "nowhere")


def rewrite(folder: Path, metadata: dict[str, str]) -> None:
    safetensors.torch.save_file(safetensors.torch.load_file(folder / MODEL), folder / MODEL, metadata)
