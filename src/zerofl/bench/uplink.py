"""`zerofl bench uplink`: the bytes and times of a real trained update on the wire."""

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch

from zerofl.bench.memory import peak_memory, reset_peak_memory
from zerofl.bench.process import in_own_process
from zerofl.data import load_dataset
from zerofl.exchange.aggregate import average
from zerofl.exchange.update import Sparse, State, Update, sparsified
from zerofl.exchange.uplink import UPLINKS, make_update
from zerofl.exchange.wire import VALUES, Schema, decode, encode, positions_size, schema_of
from zerofl.experiment import Experiment
from zerofl.fl.client import train_locally
from zerofl.fl.server import initial_state
from zerofl.report.paper_bytes import paper_csr_bytes
from zerofl.rng import rng
from zerofl.run.console import Table
from zerofl.run.origin import origin

SPARSITIES, MASK_RATIOS = (0.9, 0.95), (0.0, 0.1, 0.2)
AGGREGATED = 10
REPETITIONS = 3

Row = dict[str, Any]
T = TypeVar("T")


def bench_uplink(root: str | None, note: Callable[[str], None]) -> dict[str, Any]:
    """Train ResNet-18 on one client and put its update on the wire in every way.

    The client holds a hundredth of CIFAR-10 in `root`, or without a root 500 images of mnist5k; it trains one epoch,
    from the initial model, at each sparsity. `note` gets a line for each step. Times are the least of three.

    Returns:
        the machine, the versions, the training and aggregation figures, and `rows` with, for each combination of
        sparsity, uplink, mask ratio and values, the bytes measured, those of the dense model (`dense_bytes`), of CSR
        (`csr_bytes`), of the paper's accounting (`paper_bytes`) and the entropy of the positions (`entropy_bytes`).
    """
    dataset, clients = ("cifar10", 100) if root is not None else ("mnist5k", 8)
    rows: list[Row] = []
    training = []
    for sparsity in SPARSITIES:
        experiment = Experiment(
            dataset=dataset, root=root or "", clients=clients, clients_per_round=1, sparsity=sparsity
        )
        note(f"training one client of {dataset} at {sparsity:.0%} sparsity")
        data = load_dataset(experiment.dataset, experiment.root)
        received = initial_state(experiment, data).model
        trained, sparse, record = train_locally(received, data, experiment, round=1, client=0)
        training.append({"sparsity": sparsity, "train_seconds": record.train_seconds})
        for uplink in (name for name in UPLINKS if name != "full"):
            for mask_ratio in MASK_RATIOS:
                note(f"{uplink} at {sparsity:.0%}, mask ratio {mask_ratio}")
                update = make_update(uplink, received, trained, sparse, sparsity, mask_ratio)
                combination = {"sparsity": sparsity, "mask_ratio": mask_ratio, "uplink": uplink}
                rows += [combination | row for row in _rows(update, schema_of(received), sparse, sparsity, mask_ratio)]
    note(f"aggregating {AGGREGATED} updates")
    update = make_update("top_k_weights", received, trained, sparse, 0.9, 0.2)
    return {
        **origin(),
        "threads": torch.get_num_threads(),
        "dataset": dataset,
        "training": training,
        "aggregation": measure_aggregation(received, update),
        "rows": rows,
    }


def uplink_table(result: dict[str, Any]) -> Table:
    """The rows of `bench_uplink` for reading; sizes in MB of 10^6 bytes."""
    columns = ["uplink", "values", "sparsity", "mask", "MB", "paper", "CSR", "positions", "values MB", "/ entropy",
               "encode s", "decode s"]  # fmt: skip
    rows = [
        [
            row["uplink"],
            row["values"],
            f"{row['sparsity']:.0%}",
            str(row["mask_ratio"]),
            *(f"{row[key] / 1e6:.2f}" for key in ("bytes", "paper_bytes", "csr_bytes", "index_bytes", "value_bytes")),
            f"{row['index_bytes'] / row['entropy_bytes']:.3f}",
            *(f"{row[key]:.3f}" for key in ("encode_seconds", "decode_seconds")),
        ]
        for row in result["rows"]
    ]
    return Table(columns, rows, keys=4)


def _rows(update: Update, schema: Schema, sparse: list[str], sparsity: float, mask_ratio: float) -> Iterator[Row]:
    tensors = [tensor for tensor in update.tensors.values() if isinstance(tensor, Sparse)]
    common = {
        "index_bytes": sum(positions_size(tensor) for tensor in tensors),
        "dense_bytes": schema.dense_bytes,
        "entropy_bytes": sum(_mask_entropy_bytes(tensor) for tensor in tensors),
        "csr_bytes": len(encode(update, schema, positions="csr")),
        "paper_bytes": round(paper_csr_bytes(schema, sparse, sparsity, mask_ratio)),
    }
    for values in VALUES:
        payload, encode_seconds = _timed(partial(encode, update, schema, values=values, generator=rng(0, 0, 0, "int8")))
        _, decode_seconds = _timed(partial(decode, payload, schema))
        yield {
            "values": values,
            "bytes": len(payload),
            "value_bytes": len(payload) - common["index_bytes"],
            **common,
            "encode_seconds": encode_seconds,
            "decode_seconds": decode_seconds,
        }


def _mask_entropy_bytes(tensor: Sparse) -> float:
    """The bound on a layer's positions: numel * H(density) bits, H the binary entropy."""
    numel, p = tensor.shape.numel(), tensor.values.numel() / tensor.shape.numel()
    return 0.0 if p in (0.0, 1.0) else -numel * (p * math.log2(p) + (1 - p) * math.log2(1 - p)) / 8


def measure_aggregation(received: State, update: Update, copies: int = AGGREGATED) -> dict[str, Any]:
    """The time and peak memory of decoding and averaging `copies` of an update, in a process of its own.

    Only there does the memory that is asked for show, and not be served from what other work has freed.
    """
    payload = encode(update, schema_of(received))
    with tempfile.TemporaryDirectory() as folder:
        safetensors.torch.save_file(received, Path(folder) / "received")
        (Path(folder) / "payload").write_bytes(payload)
        return in_own_process(_aggregate, Path(folder), list(received), copies)


def _aggregate(folder: Path, names: list[str], copies: int) -> dict[str, Any]:
    tensors = safetensors.torch.load_file(folder / "received")
    received = {name: tensors[name] for name in names}
    payload = (folder / "payload").read_bytes()
    small = {"w": torch.eye(64)}
    _average(small, encode(Update(False, {"w": sparsified(small["w"])}), schema_of(small)), 1)  # libraries load lazily
    before = reset_peak_memory()
    started = time.perf_counter()
    _average(received, payload, copies)
    seconds = time.perf_counter() - started
    peak = None if before is None else peak_memory() - before
    models = None if peak is None else peak / schema_of(received).dense_bytes
    return {"updates": copies, "seconds": seconds, "peak_bytes": peak, "peak_models": models}


def _average(received: State, payload: bytes, copies: int) -> State:
    schema = schema_of(received)
    return average(received, ((decode(payload, schema), 450) for _ in range(copies)))


def _timed(call: Callable[[], T]) -> tuple[T, float]:
    least = math.inf
    for _ in range(REPETITIONS):
        started = time.perf_counter()
        result = call()
        least = min(least, time.perf_counter() - started)
    return result, least
