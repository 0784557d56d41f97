"""Whole tiny runs on the CIFAR fixture, for tests to start and look at."""

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from flwr.clientapp import ClientApp

from zerofl.experiment import Experiment
from zerofl.fl.records import ClientRecord, RoundRecord
from zerofl.flower.client_app import app as client_app
from zerofl.flower.engines import ENGINES, run_in_process
from zerofl.flower.server_app import server_app
from zerofl.run.folder import read_lines
from zerofl.run.resume import open_run


def experiment_of(root: Path, **values: Any) -> Experiment:
    settings: dict[str, Any] = {
        "root": str(root), "clients": 5, "clients_per_round": 3, "width": 4, "sparsity": 0.9, "batch_size": 8,
        "rounds": 3, "uplink": "top_k_weights_diff", "validate_every": 2, "threads": 1,
    }  # fmt: skip
    return Experiment(**(settings | values))


def run(experiment: Experiment, directory: Path, client: ClientApp = client_app, engine: str = "in-process") -> Path:
    app = server_app(experiment, directory, open_run(directory, experiment), on_round=lambda record: None)
    ENGINES[engine](app, client, experiment)
    return directory


def run_until(experiment: Experiment, directory: Path, round: int) -> None:
    """Start a run or resume it, and interrupt it after a round."""

    def stop(record: RoundRecord) -> None:
        if record.round == round:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_in_process(server_app(experiment, directory, open_run(directory, experiment), stop), client_app, experiment)


def round_record(round: int, **values: Any) -> RoundRecord:
    figures: dict[str, Any] = {
        "lr": 0.1, "clients": [], "failures": [], "uplink_bytes": 0, "downlink_bytes": 0, "nonzero_ratio": {},
        "seconds": 1.0,
    }  # fmt: skip
    return RoundRecord(round=round, **(figures | values))


def client_record(round: int, client: int, examples: int) -> ClientRecord:
    return ClientRecord(round=round, client=client, uplink_bytes=1, examples=examples, train_seconds=1.0)


def model_bytes(directory: Path) -> bytes:
    """The final model's tensors: the file without its metadata, which tells the run's settings."""
    return safetensors.torch.save(safetensors.torch.load_file(directory / "model.safetensors"))


def without_times(directory: Path) -> list[dict[str, Any]]:
    times = ("seconds", "train_seconds", "train_cpu_seconds", "train_joules", "train_joules_estimate")
    return [{k: v for k, v in record.items() if k not in times} for record in read_lines(directory / "rounds.jsonl")]
