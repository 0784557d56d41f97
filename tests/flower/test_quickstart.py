"""The example app before and after its diff: it is short, and both run."""

import subprocess
import sys
from pathlib import Path
from shutil import copytree

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "quickstart-pytorch"

ONE_ROUND = """
from flwr.app import Context, RecordDict
from zerofl.flower.engines import RUN_ID, SERVER_NODE_ID, InProcessGrid
from quickstart import client_app, server_app
config = {"num-server-rounds": 1, "fraction-train": 1.0, "local-epochs": 1, "lr": 0.02}
context = Context(RUN_ID, SERVER_NODE_ID, {}, RecordDict(), config)
server_app.app(InProcessGrid(client_app.app, 2, config), context)
print("accuracy", context.state["final"]["eval_acc"])
"""


def changed_lines() -> list[str]:
    lines = (EXAMPLE / "zerofl.diff").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.startswith(("+", "-")) and not line.startswith(("+++", "---"))]


def test_the_diff_has_under_15_lines() -> None:
    assert 0 < len(changed_lines()) < 15


@pytest.mark.parametrize("adopted", [False, True])
def test_the_example_learns(adopted: bool, tmp_path: Path) -> None:
    app = copytree(EXAMPLE, tmp_path / "app")
    if adopted:
        subprocess.run(["git", "apply", "zerofl.diff"], cwd=app, check=True)
    done = subprocess.run([sys.executable, "-c", ONE_ROUND], cwd=app, capture_output=True, text=True, check=True)
    assert float(done.stdout.rpartition("accuracy")[2]) > 0.5
