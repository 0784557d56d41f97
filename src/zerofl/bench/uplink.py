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
from zerofl.exchange.wire import (
    VALUES,
    Received,
    Schema,
    decode,
    encode,
    positions_size,
    received_model,
    schema_of,
)
from zerofl.experiment import Experiment
from zerofl.fl.client import train_client, train_locally
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


def bench_uplink(root: str | None, note: Callable[[str], None], rounds: int = 0) -> dict[str, Any]:
    """Train ResNet-18 on one client and put its update on the wire in every way.

    The client holds a hundredth of CIFAR-10 in `root`, or without a root 500 images of mnist5k; it trains one epoch, at
    each sparsity, from the initial model or the one after so many `rounds` of two other clients (Top-K-Weights, mask
    ratio 0.1). `note` gets a line for each step. Times are the least of three.

    Returns:
        the machine, the versions, the training and aggregation figures, and `rows` with, for each combination of
        sparsity, uplink, mask ratio and values, the bytes measured, those of the dense model (`dense_bytes`), of CSR
        (`csr_bytes`), of the paper's accounting (`paper_bytes`) and the entropy of the positions (`entropy_bytes`). All
        but those that are called `received_...` are of payloads that do not refer to the model that was received.
    """
    dataset, clients = ("cifar10", 100) if root is not None else ("mnist5k", 8)
    rows: list[Row] = []
    training = []
    for sparsity in SPARSITIES:
        experiment = Experiment(
            dataset=dataset, root=root or "", clients=clients, clients_per_round=1, sparsity=sparsity, mask_ratio=0.1
        )
        note(f"training one client of {dataset} at {sparsity:.0%} sparsity")
        data = load_dataset(experiment.dataset, experiment.root)
        received = initial_state(experiment, data).model
        for round in range(1, rounds + 1):
            note(f"round {round} of {rounds} before it")
            others = (train_client(received, data, experiment, round, client) for client in (1, 2))
            received = average(received, ((update, record.examples) for update, record in others))
        trained, sparse, record = train_locally(received, data, experiment, round=rounds + 1, client=0)
        schema = schema_of(received)
        reference, reference_seconds = _timed(partial(received_model, received, schema))
        training.append(
            {"sparsity": sparsity, "train_seconds": record.train_seconds, "reference_seconds": reference_seconds}
        )
        for uplink in (name for name in UPLINKS if name != "full"):
            for mask_ratio in MASK_RATIOS:
                note(f"{uplink} at {sparsity:.0%}, mask ratio {mask_ratio}")
                update = make_update(uplink, received, trained, sparse, sparsity, mask_ratio)
                combination = {"sparsity": sparsity, "mask_ratio": mask_ratio, "uplink": uplink}
                figures = _rows(update, schema, reference, sparse, sparsity, mask_ratio)
                rows += [combination | row for row in figures]
    note(f"aggregating {AGGREGATED} updates")
    update = make_update("top_k_weights", received, trained, sparse, 0.9, 0.2)
    return {
        **origin(),
        "threads": torch.get_num_threads(),
        "dataset": dataset,
        "rounds": rounds,
        "training": training,
        "aggregation": measure_aggregation(received, update),
        "rows": rows,
    }


def uplink_table(result: dict[str, Any]) -> Table:
    """The rows of `bench_uplink` for reading; sizes in MB of 10^6 bytes. "received" refers to the received model."""
    columns = ["uplink", "values", "sparsity", "mask", "MB", "received", "paper", "CSR", "positions", "values MB",
               "/ entropy", "encode s", "decode s", "received s"]  # fmt: skip
    rows = [
        [
            row["uplink"],
            row["values"],
            f"{row['sparsity']:.0%}",
            str(row["mask_ratio"]),
            *(f"{row[f'{key}bytes'] / 1e6:.2f}" for key in ("", "received_", "paper_", "csr_", "index_", "value_")),
            f"{row['index_bytes'] / row['entropy_bytes']:.3f}",
            *(f"{row[key]:.3f}" for key in ("encode_seconds", "decode_seconds")),
            f"{row['received_encode_seconds'] + row['received_decode_seconds']:.3f}",
        ]
        for row in result["rows"]
    ]
    return Table(columns, rows, keys=4)


def _rows(
    update: Update, schema: Schema, received: Received, sparse: list[str], sparsity: float, mask_ratio: float
) -> Iterator[Row]:
    named = {name: tensor for name, tensor in update.tensors.items() if isinstance(tensor, Sparse)}
    tensors = named.values()
    common = {
        "index_bytes": sum(positions_size(tensor) for tensor in tensors),
        "received_index_bytes": sum(
            positions_size(tensor, received=received.tensors[name]) for name, tensor in named.items()
        ),
        "dense_bytes": schema.dense_bytes,
        "entropy_bytes": sum(_mask_entropy_bytes(tensor) for tensor in tensors),
        "csr_bytes": len(encode(update, schema, positions="csr")),
        "paper_bytes": round(paper_csr_bytes(schema, sparse, sparsity, mask_ratio)),
    }
    for values in VALUES:
        call = partial(encode, update, schema, values=values, generator=rng(0, 0, 0, "int8"))
        payload, encode_seconds = _timed(call)
        _, decode_seconds = _timed(partial(decode, payload, schema))
        referring, received_encode_seconds = _timed(partial(call, received=received))
        _, received_decode_seconds = _timed(partial(decode, referring, schema, received))
        yield {
            "received_bytes": len(referring),
            "received_encode_seconds": received_encode_seconds,
            "received_decode_seconds": received_decode_seconds,
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
    schema = schema_of(received)
    payload = encode(update, schema, received=received_model(received, schema))
    with tempfile.TemporaryDirectory() as folder:
        safetensors.torch.save_file(received, Path(folder) / "received")
        (Path(folder) / "payload").write_bytes(payload)
        return in_own_process(_aggregate, Path(folder), list(received), copies)


def _aggregate(folder: Path, names: list[str], copies: int) -> dict[str, Any]:
    tensors = safetensors.torch.load_file(folder / "received")
    received = {name: tensors[name].clone() for name in names}  # in memory, as a server's own is, and not a mapped file
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
    reference = received_model(received, schema)
    return average(received, ((decode(payload, schema, reference), 450) for _ in range(copies)))


def _timed(call: Callable[[], T]) -> tuple[T, float]:
    least = math.inf
    for _ in range(REPETITIONS):
        started = time.perf_counter()
        result = call()
        least = min(least, time.perf_counter() - started)
    return result, least
