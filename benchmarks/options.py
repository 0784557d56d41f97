"""What the options beyond the paper cost a client's training: seconds of the processor beside the plain row's.

python benchmarks/options.py PRESET --root DIR [--run FOLDER]    prints JSON; one thread, a few minutes

The clients of the preset's row top-k-0.1 train from the initial model, or from the final one of a run, on their own
samples, with each option in turn, so that a busy machine is as busy for all. A ratio is the median over the clients.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from zerofl.data import load_dataset
from zerofl.fl.client import samples_of
from zerofl.fl.server import initial_state
from zerofl.fl.train import train_state
from zerofl.run.folder import read_model
from zerofl.run.origin import origin
from zerofl.run.sweep import find_sweep, read_sweep
from zerofl.sparse.dispatch import isa

BY_LAYER: dict[str, Any] = {"sparsity_distribution": "erdos_renyi_kernel"}
POWERS: dict[str, Any] = {"powerpropagation": 1.25}
OPTIONS: dict[str, dict[str, Any]] = {
    "by layer": BY_LAYER,
    "powers": POWERS,
    "both": BY_LAYER | POWERS,
    "by layer, 97 % of the weights": BY_LAYER | {"sparsity": 0.97, "activation_sparsity": 0.95},
    "both, 98 % of the weights": BY_LAYER | POWERS | {"sparsity": 0.98, "activation_sparsity": 0.95},
}
PASSES = 3  # over the clients; the least of a client's times counts

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("preset", help="for example small-femnist")
parser.add_argument("--root", required=True, help="the folder of its data")
parser.add_argument("--run", type=Path, help="a run's folder, whose model the clients get")
parser.add_argument("--clients", type=int, default=12)
arguments = parser.parse_args()

torch.set_num_threads(1)
plain = read_sweep(find_sweep(arguments.preset), {"root": arguments.root}).experiments()["top-k-0.1-seed1"]
experiments = {"plain": plain} | {name: dataclasses.replace(plain, **values) for name, values in OPTIONS.items()}
dataset = load_dataset(plain.dataset, plain.root)
final = arguments.run and arguments.run / "model.safetensors"
received = read_model(final)[1] if final else initial_state(plain, dataset).model
seconds: dict[str, list[float]] = {name: [] for name in experiments}
for client in range(arguments.clients):
    samples = dataset.train.take(samples_of(plain, client)[0])
    least = dict.fromkeys(experiments, float("inf"))
    for _ in range(PASSES):
        for name, experiment in experiments.items():
            started = time.thread_time()
            train_state(received, samples, dataset, experiment, round=1, client=client)
            least[name] = min(least[name], time.thread_time() - started)
    for name in experiments:
        seconds[name].append(least[name])
ratios = {
    name: median(ours / theirs for ours, theirs in zip(seconds[name], seconds["plain"], strict=True))
    for name in OPTIONS
}
found = {"isa": isa(), "preset": arguments.preset, "seconds": seconds, "ratios": ratios}
print(json.dumps({**origin(), **found}, indent=1))
