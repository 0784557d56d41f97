"""The whole method as a plain loop, with nothing of Flower: the model is that of `zerofl run`, to the bit."""

import dataclasses
import re
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.running import experiment_of, model_bytes, run, without_times
from zerofl.data import load_dataset
from zerofl.exchange.update import Update
from zerofl.exchange.uplink import UPLINKS
from zerofl.fl.client import train_client
from zerofl.fl.server import Answer, initial_state, step

# As docs/method.md has it.
LOOP = """
from zerofl.data import load_dataset
from zerofl.experiment import Experiment
from zerofl.fl.client import train_client
from zerofl.fl.server import initial_state, step, test_model
from zerofl.rng import cohort

experiment = Experiment({settings})
dataset = load_dataset(experiment.dataset, experiment.root)
state = initial_state(experiment, dataset)
for round in range(1, experiment.rounds + 1):
    clients = cohort(experiment.seed, round, experiment.clients, experiment.clients_per_round)
    answers = (train_client(state.model, dataset, experiment, round, client) for client in clients)
    state, record, _ = step(state, answers, experiment, dataset, round)
    loss, accuracy = test_model(state.evaluated(), dataset, experiment)  # the mean over rounds, with average_decay
    print(f"round {{round}}: {{accuracy:.1%}}, from {{record.examples}} samples of {{record.clients}}")
"""
PROLOGUE = "import torch\ntorch.set_num_threads(1)\n"
EPILOGUE = """
import sys
import safetensors.torch
safetensors.torch.save_file(state.evaluated(), sys.argv[1])
sys.exit(any(name.split(".")[0] in ("flwr", "ray") for name in sys.modules))
"""


@pytest.mark.parametrize("values", [*({"uplink": uplink} for uplink in UPLINKS), {"average_decay": 0.5}])
def test_a_plain_loop_ends_where_zerofl_run_ends(values: dict[str, Any], cifar_root: Path, tmp_path: Path) -> None:
    experiment = experiment_of(cifar_root, **values, clients_per_round=4, validate_every=0)
    run(experiment, tmp_path / "run")
    settings = ", ".join(f"{key}={value!r}" for key, value in vars(experiment).items())
    code = PROLOGUE + LOOP.format(settings=settings) + EPILOGUE
    command = [sys.executable, "-c", code, str(tmp_path / "model.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert model_bytes(tmp_path) == model_bytes(tmp_path / "run")
    recorded = [f"round {r['round']}: {r['test_accuracy']:.1%}, from {r['examples']} samples of {r['clients']}"
                for r in without_times(tmp_path / "run")]  # fmt: skip
    assert done.stdout.splitlines() == recorded


def test_method_md_has_the_loop() -> None:
    text = (Path(__file__).parents[2] / "docs" / "method.md").read_text(encoding="utf-8")
    beginning, end = LOOP.strip().split("{settings}")
    assert beginning in text
    assert end.replace("{{", "{").replace("}}", "}") in text


def test_the_loop_on_own_data_learns() -> None:
    text = (Path(__file__).parents[2] / "docs" / "method.md").read_text(encoding="utf-8")
    first, own = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[:2]
    imports = "\n".join(line for line in first.splitlines() if line.startswith(("from ", "import ")))
    seeded = "import torch\ntorch.manual_seed(1)\ntorch.set_num_threads(1)"
    code = f"{seeded}\n{imports}\n{own}\nimport sys\nassert 'flwr' not in sys.modules\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    accuracies = [float(line.split()[-1].rstrip("%")) for line in done.stdout.splitlines()]
    assert len(accuracies) == 3
    assert accuracies[-1] > 25  # of ten classes


def test_another_data_set_than_the_experiments_is_refused(cifar_root: Path) -> None:
    experiment = experiment_of(cifar_root)
    dataset = load_dataset(experiment.dataset, experiment.root)
    state = initial_state(experiment, dataset)
    other = dataclasses.replace(dataset, train=dataset.train.take(torch.arange(100)))
    with pytest.raises(ValueError, match=r"has 100 training samples, and cifar10, which .* deals, 200; give that one"):
        train_client(state.model, other, experiment, 1, 0)


def test_the_order_of_answers_decides_nothing_but_rounding(cifar_root: Path) -> None:
    experiment = experiment_of(cifar_root)
    dataset = load_dataset(experiment.dataset, experiment.root)
    state = initial_state(experiment, dataset)
    answers = [train_client(state.model, dataset, experiment, 1, client) for client in (0, 2, 4)]
    one, record, _ = step(state, answers, experiment, dataset, 1)
    other, same, _ = step(state, reversed(answers), experiment, dataset, 1)
    assert record.clients == same.clients == [0, 2, 4]
    for name, tensor in one.model.items():
        torch.testing.assert_close(tensor, other.model[name])


@pytest.mark.parametrize("values", ["float32", "int8"])
def test_an_update_is_let_go_before_the_next_one_is_asked_for(values: str, cifar_root: Path) -> None:
    experiment = experiment_of(cifar_root, uplink="top_k_weights", downlink_values=values)
    dataset = load_dataset(experiment.dataset, experiment.root)
    state = initial_state(experiment, dataset)
    sent = state.model if values == "float32" else {name: tensor.clone() for name, tensor in state.model.items()}
    made: list[weakref.ref[Update]] = []

    def answers() -> Iterator[Answer]:
        for client in (0, 2, 4):
            assert all(update() is None for update in made)
            answer = train_client(sent, dataset, experiment, 1, client)
            made.append(weakref.ref(answer[0]))
            yield answer
            del answer

    step(state, answers(), experiment, dataset, 1, sent)
    assert len(made) == 3
