"""A sweep of finished runs with made-up figures, for the tests of the report."""

import json
from pathlib import Path

import tomli_w
import torch

from tests.running import round_record
from zerofl.experiment import Experiment
from zerofl.fl.records import RoundRecord, Summary, savings
from zerofl.report.cells import Table, lines_of
from zerofl.run.checkpoint import save_snapshot
from zerofl.run.sweep import read_sweep

SWEEP = """# What this reproduces,
# in two lines.
#
#   zerofl run it

seeds = [1, 2]
run = [
  { name = "swat", uplink = "full", paper = { accuracy = 74.0, deviation = 0.74, size = 43.7, savings = 1.0 } },
  { name = "top-k", uplink = "top_k_weights", mask_ratio = 0.1, paper = { accuracy = 73.65, size = 14.4 } },
  { name = "dense", uplink = "full", sparsity = 0.0 },
  { name = "never-run", uplink = "full", alpha = 1000.0 },
]
[base]
rounds = 4
snapshot_every = 2
"""

LAYERS = ("layer1.conv1", "layer1.conv2")
SECONDS = {"swat": 2.0, "dense": 8.0}
UPLINK_BYTES = {"swat": 40_000_000, "dense": 40_000_000}


def accuracy(row: str, seed: int, round: int) -> float:
    return {"swat": 0.5, "dense": 0.6}.get(row, 0.4) + 0.02 * seed + 0.01 * round


def write_sweep(directory: Path, text: str = SWEEP, unfinished: str = "") -> Path:
    """The folders that runs of the sweep would leave; those of the row `unfinished` stopped after two rounds."""
    directory.mkdir(parents=True)
    (directory / "sweep.toml").write_text(text)
    for row in read_sweep(directory / "sweep.toml").rows:
        if row.name == "never-run":
            continue
        for e in row.experiments:
            folder = directory / e.name
            folder.mkdir()
            (folder / "experiment.toml").write_text(tomli_w.dumps(vars(e)))
            rounds = range(1, 3 if row.name == unfinished else 5)
            records = [record_of(row.name, e.seed, round, e.uplink) for round in rounds]
            (folder / "rounds.jsonl").write_text("".join(json.dumps(record.to_json()) + "\n" for record in records))
            if row.name != unfinished:
                (folder / "summary.json").write_text(json.dumps(summary_of(row.name, e).to_json()))
            for round in (2, 4):
                weights = {layer: torch.tensor([1.0, 2.0, 0.0, 3.0 * (round == 4)]) for layer in LAYERS}
                save_snapshot(folder, round, weights)
    return directory


def record_of(row: str, seed: int, round: int, uplink: str) -> RoundRecord:
    return round_record(
        round, train_loss=2.0 / round, test_accuracy=accuracy(row, seed, round), examples=4000,
        train_seconds=SECONDS.get(row, 1.0), train_cpu_seconds=1.5 * SECONDS.get(row, 1.0), realised_sparsity=0.95,
        uplink_bytes=10 * UPLINK_BYTES.get(row, 10_000_000), refused_bytes=1_000, downlink_bytes=300_000_000,
        nonzero_ratio=dict.fromkeys(LAYERS, 0.2),
        mask_overlap={} if uplink == "full" else dict.fromkeys(LAYERS, 0.7),
    )  # fmt: skip


def summary_of(row: str, e: Experiment) -> Summary:
    uplink_bytes = 4 * 10 * UPLINK_BYTES.get(row, 10_000_000)
    return Summary(
        name=e.name, rounds=4, validation_accuracy=accuracy(row, e.seed, 4) - 0.1,
        test_accuracy=accuracy(row, e.seed, 4), best_test_accuracy=accuracy(row, e.seed, 4) + 0.01,
        uplink_bytes=uplink_bytes, refused_bytes=4_000, downlink_bytes=4 * 300_000_000, updates=40,
        full_model_bytes=44_000_000, savings=savings(44_000_000, 40, uplink_bytes), failures=0, seconds=9.0,
        train_seconds=4 * SECONDS.get(row, 1.0), threads=2, machine="a machine", versions={"torch": "2.13"},
        data_sha256="ab" * 32, flops_a_sample={"dense": 3.3e9, "sparse": 0.4e9},
    )  # fmt: skip


def cells(table: Table, row: str) -> dict[str, str]:
    """The cells of a row by column, the lines of each with a space in between."""
    (line,) = (line for line in table.rows if line[0] == row)
    return {column: " ".join(lines_of(cell)) for column, cell in zip(table.columns, line, strict=True)}
