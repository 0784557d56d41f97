"""A real deployment on loopback, played from docs/deployment.md: TLS, registered keys, refused and dying nodes."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import write_cifar_python
from tests.running import model_bytes, run
from zerofl.experiment import Experiment
from zerofl.run.folder import read_experiment, read_lines, read_summary

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "deployment"))
import play

WAIT_SECONDS = 180


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(what: str, there: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not there():
        assert time.monotonic() < deadline, f"not after {WAIT_SECONDS} s: {what}"
        time.sleep(0.1)


class Deployment:
    """The page's commands in a folder, each with the page's exports; the servers among them can be stopped."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.exports, *self.commands = play.commands()
        self.played: set[str] = set()
        self.port, self.node_ports = free_port(), iter(lambda: free_port(), 0)
        self.servers: list[subprocess.Popen[bytes]] = []
        play.prepare(folder)

    def find(self, beginning: str, containing: str = "") -> str:
        """The one command that begins so and contains that, to be played."""
        (command,) = [c for c in self.commands if c.startswith(beginning) and containing in c]
        self.played.add(command)
        return command

    def environment(self, data: Path) -> dict[str, str]:
        return play.environment({"PORT": str(self.port), "DATA": str(data), "OMP_NUM_THREADS": "1"})

    def run(self, command: str) -> None:
        play.run(self.exports, command, self.folder, self.environment(self.folder))

    def start(self, command: str, data: Path | None = None, log: str = "") -> "subprocess.Popen[bytes]":
        if command.startswith("flower-supernode"):  # the page's ports may be taken here
            command = f"{re.sub(r' --port [0-9]+', '', command).rstrip()} --port {next(self.node_ports)}\n"
        path = self.folder / (log or f"{len(self.servers)}.log")
        server = play.start(self.exports, command, self.folder, self.environment(data or self.folder), path)
        self.servers.append(server)
        return server

    def output(self, command: str) -> str:
        return subprocess.run(
            ["bash", "-ec", f"{self.exports}\n{command}"], cwd=self.folder, env=self.environment(self.folder),
            check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip

    def run_status(self, run_id: str) -> str:
        runs = json.loads(self.output("flwr list --format json"))["runs"]
        (status,) = [r["status"] for r in runs if r["run-id"] == run_id]
        return str(status)


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A SuperLink with two registered keys; no node yet."""
    d = Deployment(tmp_path_factory.mktemp("a deployment"))
    try:
        d.run(d.find("python examples/deployment/certificates.py"))
        d.start(d.find("flower-superlink"), log="superlink.log")
        d.run(d.find("mkdir"))
        d.run(d.find("flwr supernode register"))
        yield d
    finally:
        for server in reversed(d.servers):
            play.stop(server)


@pytest.fixture(scope="module")
def datas(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two nodes' own data, of different length."""
    folders = [tmp_path_factory.mktemp(f"data of {node}") for node in (1, 2)]
    for folder, per_batch in zip(folders, (20, 30), strict=True):
        write_cifar_python(folder / "cifar-10-batches-py", per_batch)
    return folders


@pytest.fixture(scope="module")
def nodes(deployment: Deployment, datas: list[Path]) -> dict[str, "subprocess.Popen[bytes]"]:
    """The page's two nodes."""
    return {
        node: deployment.start(deployment.find("flower-supernode", node), data, f"{node}.log")
        for node, data in zip(("node-1", "node-2"), datas, strict=True)
    }


def test_the_page_is_played_and_ends_in_the_weights_of_one_process(
    deployment: Deployment, nodes: dict[str, "subprocess.Popen[bytes]"], tmp_path: Path
) -> None:
    """Two rounds over TLS with two authenticated nodes, one thread: bit for bit the in-process run's model."""
    deployment.run(deployment.find("flwr run"))
    listed = deployment.output(deployment.find("flwr list"))
    assert json.JSONDecoder().raw_decode(listed)[0]["runs"][0]["status"] == "finished:completed"
    assert deployment.played == {*deployment.commands}, "a command of the page that is not played"
    directory = deployment.folder / "runs" / "run"
    assert read_summary(directory).failures == 0
    experiment = read_experiment(directory)
    assert (experiment.rounds, experiment.clients_per_round, experiment.threads) == (2, 2, 1)
    assert model_bytes(directory) == model_bytes(run(experiment, tmp_path / "in-process"))


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (("certificates/node-1 ", "stranger/node-3 "), "Failed to activate SuperNode"),
        (("certificates/ca.crt", "stranger/ca.crt"), "CERTIFICATE_VERIFY_FAILED"),
    ],
    ids=["a key that is not registered", "another CA"],
)
def test_a_stranger_is_refused(
    change: tuple[str, str], cause: str, deployment: Deployment, request: pytest.FixtureRequest
) -> None:
    deployment.run('python examples/deployment/certificates.py stranger "$HOST" node-3')
    command = deployment.find("flower-supernode", "node-1")
    assert change[0] in command
    log = f"{request.node.callspec.id.replace(' ', '-')}.log"
    node = deployment.start(command.replace(*change), log=log)
    assert node.wait(WAIT_SECONDS) != 0
    assert cause in (deployment.folder / log).read_text(errors="replace")


def test_a_node_killed_in_mid_round_and_restarted_does_not_stop_the_run(
    deployment: Deployment,
    nodes: dict[str, "subprocess.Popen[bytes]"],
    datas: list[Path],
    cifar_root: Path,
) -> None:
    """Nodes with data of their own; the second is killed while it trains in round 1, and started again until it is in.

    The SuperLink lets it in once it has missed the old process's heartbeats.
    """
    settings = {
        "name": "killed", "dataset": "cifar10", "model": "resnet18", "width": 4, "partition": "node", "rounds": 8,
        "clients": 2, "clients_per_round": 2, "threads": 1, "root": str(cifar_root), "reply_timeout_seconds": 20.0,
    }  # fmt: skip
    config = " ".join(f"{key}={json.dumps(value)}" for key, value in settings.items())
    log = deployment.folder / "node-2.log"
    before = log.read_text(errors="replace").count("Start `flwr-clientapp` process")
    command = f"flwr run examples/flower-app --format json -c 'out=\"{deployment.folder}/runs\" {config}'"
    started = json.loads(deployment.output(command))
    wait_for("node-2 trains", lambda: log.read_text(errors="replace").count("Start `flwr-clientapp` process") > before)
    play.stop(nodes["node-2"], signal.SIGKILL)
    os.rename(log, log.with_suffix(".killed"))
    command = deployment.find("flower-supernode", "node-2")
    restarted = deployment.start(command, datas[1], log.name)
    deadline = time.monotonic() + WAIT_SECONDS
    while restarted.poll() is not None:
        assert time.monotonic() < deadline, log.read_text(errors="replace")
        restarted = deployment.start(command, datas[1], log.name)

    directory = deployment.folder / "runs" / "killed"
    wait_for("the run's end", lambda: deployment.run_status(started["run-id"]).startswith("finished"))
    assert deployment.run_status(started["run-id"]) == "finished:completed"
    first, *_, last = read_lines(directory / "rounds.jsonl")
    (failure,) = first["failures"]
    assert failure["cause"] == "no reply within 20 s"
    assert last["failures"] == []
    # Each trained on all that is in its own folder but the tenth that is held out: 100 and 150 images.
    counts = {c["client"]: c["num-examples"] for c in read_lines(directory / "clients.jsonl")}
    assert sorted(counts.values()) == [90, 135]
    assert counts[failure["client"]] == 135
    assert isinstance(read_experiment(directory), Experiment)


def test_every_setting_of_the_app_is_a_key_of_an_experiment(tmp_path: Path) -> None:
    import dataclasses
    import tomllib

    from zerofl.flower.flwr_app import read_run_config

    app = tomllib.loads((Path(play.ROOT) / "examples" / "flower-app" / "pyproject.toml").read_text())
    config = app["tool"]["flwr"]["app"]["config"]
    experiment, out, resume = read_run_config(config | {"out": str(tmp_path)})
    assert (out, resume) == (tmp_path, False)
    keys = {field.name for field in dataclasses.fields(Experiment)}
    left_out = {"activation_sparsity", "clients_at_once", "ray_address", "client_cpus", "client_gpus"}
    assert config.keys() == keys - left_out | {"out", "resume"}
    defaults = Experiment()
    of_the_app = {"dataset", "clients", "clients_per_round", "model", "rounds", "batch_size", "uplink"}
    of_the_app |= {"initialization", "reply_timeout_seconds"}
    assert {key for key in keys if getattr(experiment, key) != getattr(defaults, key)} == of_the_app


def test_the_error_of_a_folder_says_what_to_set_in_the_run_config(cifar_root: Path, tmp_path: Path) -> None:
    from flwr.app import Context, RecordDict, UserConfig

    from tests.run.folders import save
    from zerofl.experiment import make_experiment
    from zerofl.flower.client_app import app as client_app
    from zerofl.flower.engines import InProcessGrid
    from zerofl.flower.flwr_app import app
    from zerofl.run.files import ResultsError
    from zerofl.run.resume import open_run

    config: UserConfig = {"name": "run", "root": str(cifar_root), "clients": 5, "clients_per_round": 3, "width": 4}
    open_run(tmp_path / "run", make_experiment(config))
    save(tmp_path / "run", 1)
    context = Context(1, 1, {}, RecordDict(), config | {"out": str(tmp_path)})
    with pytest.raises(ResultsError, match=r"holds a run already.*\(in the run config: resume=true, or another out"):
        app(InProcessGrid(client_app, 5), context)
