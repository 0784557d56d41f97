"""The examples of the documents, run: Python, files of experiments, a Flower app, and what the shell makes of them."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from torch import nn

from tests.documents.reading import PAGES, ROOT, SHELL, blocks, summary_of
from tests.flower.test_deployment import free_port
from tests.running import experiment_of, run
from zerofl.cli import main
from zerofl.models import LeafCNN

sys.path.insert(0, str(ROOT / "examples" / "deployment"))
import play

EXPERIMENTS = ROOT / "docs" / "experiments.md"


def test_the_file_of_experiments_runs(cifar_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`zerofl run file.toml --root DIR`, at the size of the fixture."""
    assert "zerofl run file.toml --root DIR" in EXPERIMENTS.read_text(encoding="utf-8")
    (example,) = blocks(EXPERIMENTS, "toml")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.toml").write_text(example)
    small = {"clients": 4, "clients_per_round": 2, "width": 4, "rounds": 1, "threads": 1}
    settings = [word for key, value in small.items() for word in ("--set", f"{key}={value}")]
    assert main(["run", "file.toml", "--root", str(cifar_root), *settings]) == 0
    assert summary_of(tmp_path / "runs" / "file" / "zerofl")["rounds"] == 1


@pytest.mark.parametrize("name", ["README.md", "docs/adoption.md", "docs/experiments.md"])
def test_a_pages_python_runs(name: str, cifar_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a model, an app and a run of the reader's; the run stands where the page says."""
    monkeypatch.chdir(tmp_path)
    if "load_model" in (ROOT / name).read_text(encoding="utf-8"):
        run(experiment_of(cifar_root, rounds=1), tmp_path / "runs" / "demo" / "zerofl")
    names = {
        "ClientApp": ClientApp,
        "FedAvg": FedAvg,
        "model": LeafCNN(),
        "torch": torch,
        "x": torch.zeros(2, 1, 28, 28),
    }
    for block in blocks(ROOT / name, "python"):
        exec(block, names)
    assert isinstance(names["model"], nn.Module)


def test_every_page_with_python_is_run() -> None:
    """Here, in test_tutorial.py, in test_extending.py, or in the tests of fl/."""
    run_by_tests = {"README.md", "adoption.md", "experiments.md", "tutorial.md", "extending.md", "method.md"}
    assert {page.name for page in PAGES if blocks(page, "python")} <= run_by_tests


def test_the_picture_is_that_of_the_record() -> None:
    picture = runpy.run_path(str(ROOT / "benchmarks" / "picture.py"))
    drawn = picture["draw"]({run: picture["read_rounds"](run) for run in picture["RUNS"]})
    assert picture["PICTURE"].read_text(encoding="utf-8") == drawn
    assert "5 times less" in drawn
    assert "18 % of vanilla SWAT's" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_simulations_flower_app_runs(tmp_path: Path) -> None:
    """The page's `flwr run`, really: Flower's simulation on ports of its own, with two clients and one round."""
    (block,) = blocks(play.PAGE, "console")
    command = block.replace("\\\n", " ").strip()
    assert command.startswith("flwr run")
    for printed, small in (
        ('out=\\"$PWD/runs\\"', f'out=\\"{tmp_path}/runs\\" clients=2 clients_per_round=2 rounds=1 threads=1'),
        ("num-supernodes=10", "num-supernodes=2"),
        (" --stream", ""),
    ):
        assert printed in command
        command = command.replace(printed, small)
    port = free_port()
    env = play.environment({
        "FLWR_HOME": str(tmp_path / "flwr home"), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1", "RAY_USAGE_STATS_ENABLED": "0",
    })  # fmt: skip
    superlink = f"flower-superlink --insecure --simulation --host 127.0.0.1 --port {port}\n"
    config = f'[superlink]\ndefault = "mine"\n[superlink.mine]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    (tmp_path / "flwr home").mkdir()
    (tmp_path / "flwr home" / "config.toml").write_text(config)
    server = play.start("", superlink, tmp_path, env, tmp_path / "superlink.log")
    try:
        subprocess.run(["bash", "-ec", f"{command} --stream"], cwd=ROOT, env=env, check=True, timeout=180)
        assert summary_of(tmp_path / "runs" / "run")["updates"] == 2
    finally:
        play.stop(server)


def test_the_page_is_played_in_a_new_folder_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").write_text("")
    with pytest.raises(SystemExit) as refused:
        play.main([str(tmp_path)])
    assert refused.value.code == 2
    assert f"{tmp_path} is there already" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["mine"]
    with pytest.raises(SystemExit):
        play.main([str(tmp_path / "mine")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_shell_understands_the_blocks_and_variables_are_quoted(page: Path) -> None:
    """A path with a space would fall apart: every `$NAME` of a command stands within quotes."""
    for block in blocks(page, *SHELL):
        subprocess.run(["bash", "-n", "-c", block], check=True)
        code = re.sub(r"<<END\n.*?^END$", "", block, flags=re.DOTALL | re.MULTILINE)
        code = re.sub(r'"(?:\\.|[^"\\])*"|\'[^\']*\'|#.*', "", code)
        assert "$" not in code, f"{page.name}: {code}"
