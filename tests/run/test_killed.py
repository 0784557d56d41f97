"""A killed run resumes, and other data is refused."""

import dataclasses
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from tests.running import experiment_of, model_bytes, run, run_until, without_times
from zerofl.cli import main
from zerofl.cli.importing import INTERRUPTED, TERMINATED
from zerofl.data import load_dataset
from zerofl.exchange.uplink import UPLINKS
from zerofl.experiment import ExperimentError
from zerofl.flower.client_app import app as client_app
from zerofl.flower.messages import read_payload
from zerofl.run.checkpoint import read_snapshots
from zerofl.run.files import ResultsError
from zerofl.run.folder import read_lines
from zerofl.run.preflight import check_fits


def test_a_killed_run_resumes_to_the_same_weights_and_record(cifar_root: Path, tmp_path: Path) -> None:
    file = tmp_path / "killed.toml"
    file.write_text(f"""
[base]
root = "{cifar_root}"
clients = 5
clients_per_round = 3
width = 4
sparsity = 0.9
rounds = 6
threads = 1
server_optimizer = "fedadam"
uplink = "diff_on_top_k_weights"
mask_ratio = 0.1
augment = true
validate_every = 2
[[run]]
name = "fedadam"
""")
    whole = tmp_path / "whole"
    assert main(["run", str(file), "--out", str(whole)]) == 0

    out = tmp_path / "out"
    command = [sys.executable, "-m", "zerofl.cli", "run", str(file), "--out", str(out)]
    for last_line, kill, status in (("round 2/6", signal.SIGKILL, -signal.SIGKILL), ("round 4/6", signal.SIGTERM, 143)):
        with subprocess.Popen([*command, "--resume"], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if last_line in line:
                    os.kill(process.pid, kill)
                    break
        assert process.wait() == status
        assert (out / "fedadam" / "checkpoint.safetensors").exists()
        assert not (out / "fedadam" / "summary.json").exists()
    assert main(["run", str(file), "--out", str(out), "--resume"]) == 0
    assert model_bytes(out / "fedadam") == model_bytes(whole / "fedadam")
    assert without_times(out / "fedadam") == without_times(whole / "fedadam")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, INTERRUPTED), (signal.SIGTERM, TERMINATED)])
def test_the_status_is_that_of_the_signal_whatever_the_wait_makes_of_it(
    number: int, status: int, cifar_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wait(*_: object) -> None:
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            raise KeyboardInterrupt from None  # as ray.wait does

    monkeypatch.setattr("zerofl.run.one.run_one", wait)
    file = tmp_path / "file.toml"
    file.write_text(f'[base]\nroot = "{cifar_root}"\nclients = 5\nclients_per_round = 3\n[[run]]\nname = "run"\n')
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert main(["run", str(file), "--out", str(tmp_path / "out")]) == status
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_broadcast_is_not_changed_by_the_clients(cifar_root: Path, tmp_path: Path) -> None:
    """In one process all clients share the message's bytes: the order of the clients must not matter."""
    experiment = experiment_of(cifar_root, rounds=1, clients=1, clients_per_round=1)
    payloads: list[bytes] = []
    app = ClientApp()
    app.evaluate()(lambda message, context: client_app(message, context))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        replies = [client_app(message, context) for _ in range(2)]
        payloads.extend(read_payload(reply) for reply in replies)
        return replies[0]

    run(experiment, tmp_path / "run", app)
    assert payloads[0] == payloads[1]


def test_a_client_too_small_to_hold_anything_out_has_no_part_in_the_validation(
    cifar_root: Path, tmp_path: Path
) -> None:
    run(experiment_of(cifar_root, validation_fraction=0.0, validate_every=1), tmp_path / "run")
    for record in read_lines(tmp_path / "run" / "rounds.jsonl"):
        assert (record.get("validation_accuracy"), record["failures"]) == (None, [])


def test_other_data_under_the_same_run_is_refused(cifar_root: Path, tmp_path: Path) -> None:
    """A run of three rounds is stopped after two, and resumed with one pixel changed."""
    experiment = experiment_of(cifar_root)

    directory = tmp_path / "run"
    run_until(experiment, directory, 2)

    other = tmp_path / "other"
    shutil.copytree(cifar_root, other)
    path = other / "cifar-10-batches-py" / "data_batch_1"
    batch = pickle.loads(path.read_bytes(), encoding="bytes")
    batch[b"data"][0, 0] ^= 1
    path.write_bytes(pickle.dumps(batch, protocol=2))
    with pytest.raises(ResultsError, match=r"rounds 1 to 2 were trained on other data than is in .*other"):
        run(dataclasses.replace(experiment, root=str(other)), directory)

    same = tmp_path / "same"
    shutil.copytree(cifar_root, same)
    run(dataclasses.replace(experiment, root=str(same)), directory)
    assert model_bytes(directory) == model_bytes(run(experiment, tmp_path / "whole"))


def test_kept_weights_are_those_of_the_aggregated_model(cifar_root: Path, tmp_path: Path) -> None:
    run(experiment_of(cifar_root, snapshot_every=2), tmp_path / "run")
    snapshots = read_snapshots(tmp_path / "run")
    assert list(snapshots) == [2, 3]  # every second round, and the last one
    final = safetensors.torch.load(model_bytes(tmp_path / "run"))
    assert len(snapshots[3]) == 16
    for name, weight in snapshots[3].items():
        assert torch.equal(weight, final[f"{name}.weight"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("uplink", UPLINKS)
def test_a_run_on_a_gpu_follows_the_one_on_the_cpu(uplink: str, cifar_root: Path, tmp_path: Path) -> None:
    experiment = experiment_of(cifar_root, uplink=uplink, rounds=1, augment=True)
    runs = [run(dataclasses.replace(experiment, device=d), tmp_path / d) for d in ("cpu", "cuda")]
    cpu, cuda = (read_lines(directory / "rounds.jsonl")[0] for directory in runs)
    assert cuda["train_loss"] == pytest.approx(cpu["train_loss"], rel=0.05)
    assert cuda["clients"] == cpu["clients"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_a_gpu_that_is_not_there_is_refused(cifar_root: Path) -> None:
    with pytest.raises(ExperimentError, match=r"device = 'cuda': PyTorch .* finds no CUDA device here"):
        check_fits(experiment_of(cifar_root, device="cuda"), load_dataset("cifar10", str(cifar_root)))
