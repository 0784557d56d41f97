"""Clients on Ray: workers that die, interrupts, and whose Ray it is."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from tests.running import experiment_of, model_bytes, run, run_until, without_times
from zerofl.cli.importing import INTERRUPTED, TERMINATED
from zerofl.flower.client_app import app as client_app
from zerofl.run.checkpoint import load_checkpoint
from zerofl.run.files import CHECKPOINT
from zerofl.run.folder import read_lines

pytest.importorskip("ray")

FILE = """
[base]
root = "{root}"
clients = 5
clients_per_round = 3
width = 4
sparsity = 0.9
batch_size = 8
rounds = {rounds}
uplink = "top_k_weights_diff"
threads = 1
[[run]]
name = "run"
"""


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """A folder of Ray's own: its sockets need a short path, which `tmp_path` is not."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def dying(marks: Path, once: int, always: int) -> ClientApp:
    """The real client app, in which the process of one client is killed the first time, and that of another always."""
    app = ClientApp()
    app.evaluate()(lambda message, context: client_app(message, context))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        client, mark = context.node_config["partition-id"], marks / "killed once"
        if client == always or (client == once and not mark.exists()):
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return client_app(message, context)

    return app


def test_a_killed_worker_is_made_anew_and_its_client_asked_again(
    cifar_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the client whose process dies again and again fails; nobody else's round suffers."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # a cluster that is long gone: not to be joined
    experiment = experiment_of(cifar_root, clients=4, clients_per_round=4, rounds=2, validate_every=0)
    run(experiment, tmp_path / "ray", dying(tmp_path, once=1, always=3), engine="ray")
    for record in read_lines(tmp_path / "ray" / "rounds.jsonl"):
        assert [failure["client"] for failure in record["failures"]] == [3]
        assert record["failures"][0]["cause"] == "its worker process died, and died again when it was asked once more"

    def refuse(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 3:
            raise RuntimeError("as on Ray")
        return client_app(message, context)

    app = ClientApp()
    app.train()(refuse)
    run(experiment, tmp_path / "in-process", app)
    assert model_bytes(tmp_path / "ray") == model_bytes(tmp_path / "in-process")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, INTERRUPTED), (signal.SIGTERM, TERMINATED)])
def test_an_interrupted_run_is_gone_and_goes_on_as_if_nothing_had_happened(
    number: int, status: int, cifar_root: Path, tmp_path: Path, ray_folder: Path
) -> None:
    file, out = tmp_path / "file.toml", tmp_path / "out"
    file.write_text(FILE.format(root=cifar_root, rounds=500))
    command = [sys.executable, "-m", "zerofl.cli", "run", str(file), "--out", str(out), "--engine", "ray"]
    environment = os.environ | {"RAY_TMPDIR": str(ray_folder)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        while "round 1/500" not in (line := process.stdout.readline()):
            assert line, process.stderr.read() if process.stderr else ""
        process.send_signal(number)
        _, said = process.communicate()
    assert process.returncode == status
    assert "zerofl: interrupted; resume with: " in said
    assert not [line for line in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
                .stdout.splitlines() if str(ray_folder) in line]  # fmt: skip
    done = len(read_lines(out / "run" / "rounds.jsonl"))
    assert 1 <= done < 500
    # Two rounds more, in one process, are those of a run that nobody disturbed.
    experiment = experiment_of(cifar_root, rounds=500, validate_every=0)
    for directory in (out / "run", tmp_path / "undisturbed"):
        run_until(experiment, directory, done + 2)
    assert without_times(out / "run") == without_times(tmp_path / "undisturbed")
    states = [load_checkpoint(directory / CHECKPOINT).state for directory in (out / "run", tmp_path / "undisturbed")]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
