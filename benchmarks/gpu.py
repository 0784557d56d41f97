"""What a GPU does with a quarter of an hour: the CUDA tests, a step and a round taken apart, and rows of Table 1.

python benchmarks/gpu.py --minutes 14 --root CIFAR-10 --out DIR [--femnist FEMNIST]

It runs from a source tree (PYTHONPATH=src, without the kernels then) or with the package installed, without network.
CIFAR-10 is in one of the forms that docs/experiments.md names, or packed as lossless WebP sheets of 25 x 40 images
(train_00.webp, ... and train_labels.npy, in a folder or in cifar10_train.zip and cifar10_test.zip).

DIR gets gpu.json, with all figures and where they come from, and table1-cifar10.zip, the records of the rows, which
`zerofl report` reads. Runs, with their checkpoints, are in DIR-work. Called again it resumes there; with the archive
alone, on another machine, it does not repeat the rows that are finished.
"""

import argparse
import copy
import io
import json
import pickle
import signal
import subprocess
import sys
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from zerofl.data import Dataset, Split, dataset_on, load_dataset
from zerofl.exchange.wire import decode, encode, received_model, schema_of
from zerofl.experiment import Experiment
from zerofl.fl import compiled
from zerofl.fl.client import samples_of, train_client
from zerofl.fl.precision import arithmetic
from zerofl.fl.server import initial_state
from zerofl.fl.train import empty_model, train_state
from zerofl.run.files import CLIENTS, EXPERIMENT, ROUNDS, SUMMARY, SWEEP
from zerofl.run.folder import is_finished, read_clients, read_rounds
from zerofl.run.origin import origin
from zerofl.run.sweep import find_sweep, read_sweep
from zerofl.sparse.topk import kth_by_torch_topk, top_k_threshold

PRESET = "table1-cifar10"
ROWS = [
    "recommended-seed1", "95-niid-top-k-0.2-seed1", "95-niid-swat-seed1", "95-niid-top-k-0.2-seed2",
    "95-niid-swat-seed2", "95-niid-diff-0.1-seed1", "95-niid-top-k-0.0-seed1", "90-niid-swat-seed1",
    "90-niid-top-k-0.2-seed1",
]  # fmt: skip
"""The most informative first."""

ROOT = Path(__file__).parents[1]
TESTS = ["tests/sparse/test_cuda_select.py", "tests/sparse/test_swat.py", "tests/fl/test_compiled.py",
         "tests/exchange/test_update.py", "tests/run/test_killed.py"]  # fmt: skip
EARLY_ROUNDS = 2
"""Rounds in which steps are recorded and libraries load; they are left out of a round's median."""


def main() -> int:
    """Measure what there is time for; each figure is written as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=14.0)
    parser.add_argument("--root", type=Path, required=True, help="CIFAR-10")
    parser.add_argument("--femnist", type=Path, help="FEMNIST, for a round of LEAF's CNN")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda", help="cpu is for trying this script")
    parser.add_argument(
        "--set", action="append", default=[], metavar="key=value", help="of every run, as for zerofl run"
    )
    options = parser.parse_args()
    deadline = time.monotonic() + 60 * options.minutes
    if options.device != "cpu" and not torch.cuda.is_available():
        parser.error("PyTorch finds no CUDA device here; --device cpu tries the script without one")
    out: Path = options.out
    work = out.with_name(out.name + "-work")
    for folder in (out, work):
        folder.mkdir(parents=True, exist_ok=True)
    root = unpacked(options.root, work)
    runs = work / "runs"
    earlier = out / f"{PRESET}.zip"
    if earlier.exists() and not runs.exists():
        unpack_finished(earlier, runs)
    settings = [f"--set={setting}" for setting in (f"device={options.device}", "threads=1", *options.set)]

    name = torch.cuda.get_device_name() if options.device != "cpu" else "CPU"
    figures: dict[str, Any] = {"gpu": name, "cuda": torch.version.cuda, "origin": origin()}
    before = json.loads((out / "gpu.json").read_text("utf-8")) if (out / "gpu.json").exists() else {}
    if before.items() >= figures.items():  # the same code on the same card
        figures = before
    sections: dict[str, Callable[[], Any]] = {
        "tests": tests,
        "selection_ms": lambda: selection(options.device),
        "gradient_error": lambda: gradient_error(root, options.device, options.set),
        "step_ms": lambda: step_times(root, options.device, options.set),
        "coding_seconds": lambda: coding_times(root, options.set),
        "round_sparse": lambda: a_round(work, "95-niid-top-k-0.2-seed1", root, settings),
        "round_dense": lambda: a_round(work, "dense-seed1", root, settings),
    }
    if options.femnist:
        writers = len(load_dataset("femnist", str(options.femnist)).clients)
        of_femnist = [*settings, f"--set=clients={writers}"]
        sections["round_leaf_cnn"] = lambda: a_round(
            work, "top-k-0.2-seed1", options.femnist, of_femnist, "table1-femnist"
        )
    failed: dict[str, str] = {}
    for section, measure in sections.items():
        if section in figures:
            continue
        started = time.monotonic()
        print(f"{section} ...", flush=True)
        try:
            figures[section] = measure()
        except Exception as error:  # whatever it is, the other parts and the rows have their turn
            traceback.print_exc()
            failed[section] = f"{type(error).__name__}: {error}"
            continue
        print(
            f"{json.dumps(figures[section], indent=1)}\n{section} took {time.monotonic() - started:.0f} s", flush=True
        )
        write(out / "gpu.json", json.dumps(figures, indent=1).encode())

    for row in ROWS:
        if time.monotonic() < deadline and not finished(runs / row):
            command = [PRESET, "--only", row, "--root", str(root), "--out", str(runs), "--resume", *settings]
            try:
                zerofl_run(command, deadline)
            except RuntimeError as error:
                failed[row] = str(error)
        pack(runs, earlier)
    figures["rows"] = {row: row_figures(runs / row) for row in ROWS if (runs / row / ROUNDS).exists()}
    write(out / "gpu.json", json.dumps(figures, indent=1).encode())
    print_table(figures["rows"])
    for part, reason in failed.items():
        print(f"failed: {part}: {reason}")
    return 1 if failed else 0


def tests() -> str:
    """The last line of pytest's over the tests that a GPU is for."""
    if not all((ROOT / path).exists() for path in TESTS):
        return "not run: they are in the source tree"
    command = [sys.executable, "-m", "pytest", "-k", "gpu or cuda", "--continue-on-collection-errors", *TESTS]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    failures = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return "; ".join([*failures, (done.stdout.strip().splitlines() or [done.stderr[-300:]])[-1]])


def selection(device: str) -> dict[str, float]:
    """Milliseconds for the threshold of an activation of ResNet-18, as ReLU leaves it; the same by torch.topk."""
    x = torch.randn(32, 64, 32, 32, device=device).relu()
    k = x.numel() // 20
    return {
        "top_k_threshold": timed(lambda: top_k_threshold(x, k)),
        "torch.topk": timed(lambda: kth_by_torch_topk(x, k)),
    }


def timed(call: Callable[[], Any], calls: int = 20) -> float:
    """The median of a call in milliseconds."""
    times = []
    for _ in range(calls + 3):
        synchronize()
        started = time.perf_counter()
        call()
        synchronize()
        times.append(1000 * (time.perf_counter() - started))
    return median(times[3:])


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def experiment_of(root: Path, device: str, values: list[str], **more: Any) -> Experiment:
    """Table 1's row of Top-K-Weights, on this device and with the given settings."""
    from zerofl.experiment import parse_setting

    sweep = read_sweep(
        find_sweep(PRESET), dict(map(parse_setting, values)) | {"root": str(root), "device": device} | more
    )
    return sweep.experiments()["95-niid-top-k-0.2-seed1"]


def gradient_error(root: Path, device: str, values: list[str]) -> dict[str, dict[str, float]]:
    """A step's gradients beside float64: the error of each parameter's, relative to its largest; median and worst.

    Of noise, since the equal pixels of pictures make ties of the top K, which rounding takes apart.
    """
    experiment = experiment_of(root, "cpu", values)
    dataset = load_dataset(experiment.dataset, experiment.root)
    labels = dataset.train.labels[:32]
    images = torch.randn((32, *dataset.train.images.shape[1:]), generator=torch.Generator().manual_seed(1))
    model = empty_model(experiment, dataset)
    model.load_state_dict(initial_state(experiment, dataset).model, assign=True)
    exact = gradients(copy.deepcopy(model).double(), images.double(), labels)
    errors = {}
    for precision in ("float32", "tf32"):
        with arithmetic(precision, device):
            found = gradients(copy.deepcopy(model).to(device), images.to(device), labels.to(device))
        relative = [float((g.cpu() - e).abs().max() / e.abs().max()) for g, e in zip(found, exact, strict=True)]
        errors[precision] = {"median": median(relative), "worst": max(relative)}
    return errors


def gradients(model: nn.Module, images: Tensor, labels: Tensor) -> list[Tensor]:
    """Of the mean loss of a batch."""
    loss = F.cross_entropy(model.train()(images), labels)
    return list(torch.autograd.grad(loss, list(model.parameters())))


def step_times(root: Path, device: str, values: list[str]) -> dict[str, Any]:
    """Milliseconds a step takes in each precision, sparse and dense, and eagerly; what a sparse one consists of."""
    steps: dict[str, Any] = {}
    for precision in ("float32", "tf32", "bfloat16"):
        for kind, more in (("sparse", {}), ("dense", {"sparsity": 0.0, "activation_sparsity": 0.0, "uplink": "full"})):
            experiment = experiment_of(root, device, values, precision=precision, epochs=4, **more)
            slot, arguments = slot_of(experiment)
            with arithmetic(precision, device):
                milliseconds = timed(partial(slot.train, **arguments), calls=5)
            steps[f"{kind}, {precision}"] = milliseconds / step_count(arguments, experiment)
    experiment = experiment_of(root, device, values, precision="tf32", epochs=4)
    dataset = dataset_on(experiment.dataset, experiment.root, device)
    slot, arguments = slot_of(experiment)
    with arithmetic("tf32", device):
        eager = timed(lambda: train_state(dataset=dataset, experiment=experiment, **arguments), calls=2)
        steps["sparse, tf32, without a graph"] = eager / step_count(arguments, experiment)
        if device != "cpu":
            steps["kernels of sparse, tf32"] = kernels(
                lambda: slot.train(**arguments), step_count(arguments, experiment)
            )
    return steps


def coding_times(root: Path, values: list[str]) -> dict[str, float]:
    """Seconds in which so many threads encode and decode an update ten times: what the wire adds to a round."""
    experiment = experiment_of(root, "cpu", values)
    dataset = load_dataset(experiment.dataset, experiment.root)
    received = initial_state(experiment, dataset).model
    schema = schema_of(received)
    reference = received_model(received, schema)
    update, _ = train_client(received, dataset, experiment, round=1, client=0)
    payload = encode(update, schema, received=reference)
    calls = {
        "encode": lambda _: encode(update, schema, received=reference),
        "decode": lambda _: decode(payload, schema, reference),
    }
    seconds = {}
    for threads in (1, 2, 4, 10):
        with ThreadPoolExecutor(threads) as coders:
            for what, call in calls.items():
                started = time.perf_counter()
                list(coders.map(call, range(10)))
                seconds[f"{what}, {threads} threads"] = time.perf_counter() - started
    return seconds


def slot_of(experiment: Experiment) -> tuple[compiled.Slot, dict[str, Any]]:
    """A slot, and what it trains client 0 on."""
    dataset: Dataset = dataset_on(experiment.dataset, experiment.root, experiment.device)
    received = {name: t.to(experiment.device) for name, t in initial_state(experiment, dataset).model.items()}
    split: Split = dataset.train.take(samples_of(experiment, 0)[0].to(experiment.device))
    return compiled.Slot(experiment, dataset), {"received": received, "split": split, "round": 1, "client": 0}


def step_count(arguments: Mapping[str, Any], experiment: Experiment) -> int:
    """Steps of a client, the short ones of an epoch's end among them."""
    return experiment.epochs * -(-len(arguments["split"].labels) // experiment.batch_size)


def kernels(call: Callable[[], Any], steps: int) -> dict[str, float]:
    """Milliseconds of a step in each of the GPU's kernels that take longest."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        call()
        synchronize()
    found = {event.key[:100]: event.self_device_time_total / 1000 / steps for event in profiled.key_averages()}
    return dict(sorted(found.items(), key=lambda item: -item[1])[:15])


def a_round(work: Path, run: str, root: Path, settings: list[str], preset: str = PRESET) -> dict[str, float]:
    """A round of `zerofl run`, the median after the first ones; what its longest client leaves is not training."""
    folder = work / f"round-{preset}-{run}"
    used = memory_used()
    of_run = [preset, "--only", run, "--root", str(root), "--out", str(folder), "--resume"]
    most = zerofl_run([*of_run, *settings, f"--set=rounds={EARLY_ROUNDS + 10}", "--set=evaluate_every=1000"])
    rounds = read_rounds(folder / run)[EARLY_ROUNDS:-1]  # the last one evaluates
    longest = dict[int, float]()
    for client in read_clients(folder / run):
        longest[client.round] = max(longest.get(client.round, 0.0), client.train_seconds or 0.0)
    return {
        "seconds": median(record.seconds for record in rounds),
        "not_training_seconds": median(record.seconds - longest[record.round] for record in rounds),
        "clients": median(len(record.clients) for record in rounds),
        "memory_gb": max(0, most - used) / 1e9,
    }


def memory_used() -> int:
    """Bytes of the GPU that are in use, by whomever."""
    if not torch.cuda.is_available():
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free


def zerofl_run(arguments: list[str], deadline: float | None = None) -> int:
    """`zerofl run`, interrupted when the time is over; returns the most memory of the GPU that was in use meanwhile."""
    most = 0
    with subprocess.Popen([sys.executable, "-m", "zerofl.cli", "run", *arguments]) as process:
        while process.poll() is None:
            most = max(most, memory_used())
            if deadline and time.monotonic() > deadline:
                process.send_signal(signal.SIGINT)
                deadline = None
            time.sleep(0.2)
    if process.returncode not in (0, 130):
        raise RuntimeError(f"zerofl run {' '.join(arguments)}: ended with status {process.returncode}")
    return most


def finished(run: Path) -> bool:
    """Whether a run has its summary."""
    return run.exists() and is_finished(run)


def pack(runs: Path, archive: Path) -> None:
    """Put the records of all runs into an archive, without weights and checkpoints."""
    records, packed = (EXPERIMENT, ROUNDS, CLIENTS, SUMMARY, SWEEP), io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(path for path in runs.rglob("*") if path.name in records):
            file.write(path, path.relative_to(runs))
    write(archive, packed.getvalue())


def unpack_finished(archive: Path, runs: Path) -> None:
    """Of an archive the runs that are finished: another one has no checkpoint there to go on from."""
    with zipfile.ZipFile(archive) as file:
        done = {str(Path(name).parent) for name in file.namelist() if Path(name).name == SUMMARY}
        file.extractall(runs, [name for name in file.namelist() if str(Path(name).parent) in {*done, "."}])


def write(path: Path, data: bytes) -> None:
    """The whole file or nothing of it: the machine may be taken away at any time."""
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(data)
    part.replace(path)


def row_figures(run: Path) -> dict[str, Any]:
    """Where a run has come to: accuracy after the last evaluation and the mean of the last five; seconds a round."""
    rounds = read_rounds(run)
    accuracies = [record.test_accuracy for record in rounds if record.test_accuracy is not None]
    return {
        "rounds": len(rounds),
        "finished": finished(run),
        "test_accuracy": accuracies[-1] if accuracies else None,
        "mean_of_last_five": sum(accuracies[-5:]) / len(accuracies[-5:]) if accuracies else None,
        "seconds_a_round": sum(record.seconds for record in rounds) / len(rounds),
        "uplink_mb_a_client": sum(r.uplink_bytes for r in rounds) / 1e6 / sum(len(r.clients) for r in rounds),
    }


def print_table(rows: Mapping[str, Mapping[str, Any]]) -> None:
    """The rows beside the paper's accuracies."""
    papers = {row.name: row.paper for row in read_sweep(find_sweep(PRESET)).rows}
    print(f"\n{'row':<28}{'rounds':>7}{'accuracy %':>12}{'last five':>11}{'paper':>8}{'s a round':>11}{'MB up':>8}")
    for name, row in rows.items():
        paper = papers[name.rpartition("-seed")[0]].get("accuracy", float("nan"))
        shown = (row["test_accuracy"], row["mean_of_last_five"])
        last, five = (float("nan") if accuracy is None else 100 * accuracy for accuracy in shown)
        print(f"{name:<28}{row['rounds']:>7}{last:>12.2f}{five:>11.2f}{paper:>8.2f}{row['seconds_a_round']:>11.3f}"
              f"{row['uplink_mb_a_client']:>8.2f}")  # fmt: skip


def unpacked(root: Path, work: Path) -> Path:
    """CIFAR-10 as batches: `root` as it is, or what its WebP sheets hold, in the working folder."""
    packed = dict(sheets(root))
    if not packed:
        return root
    batches = work / "cifar-10-batches-py"
    if not (batches / "test_batch").exists():
        batches.mkdir(exist_ok=True)
        for part, names in (("train", [f"data_batch_{i}" for i in range(1, 6)]), ("test", ["test_batch"])):
            images = np.concatenate(
                [
                    images_of(data)
                    for name, data in sorted(packed.items())
                    if name.startswith(f"{part}_") and name.endswith(".webp")
                ]
            )
            labels = np.load(io.BytesIO(packed[f"{part}_labels.npy"]))
            for name, x, y in zip(names, np.split(images, len(names)), np.split(labels, len(names)), strict=True):
                write(batches / name, pickle.dumps({b"data": x.reshape(len(x), -1), b"labels": y.tolist()}))
    return batches


def sheets(root: Path) -> Iterator[tuple[str, bytes]]:
    """The files with sheets and labels, by name, in a folder or in zip files there."""
    for path in root.glob("*.zip"):
        with zipfile.ZipFile(path) as packed:
            yield from (
                (Path(name).name, packed.read(name)) for name in packed.namelist() if name.endswith((".webp", ".npy"))
            )
    for path in root.rglob("*_[0-9][0-9].webp"):
        yield path.name, path.read_bytes()
    for path in root.rglob("*_labels.npy"):
        yield path.name, path.read_bytes()


def images_of(sheet: bytes) -> np.ndarray:
    """The 1,000 images of a sheet, bytes [1000, 3, 32, 32]."""
    pixels = np.asarray(Image.open(io.BytesIO(sheet)).convert("RGB"))
    return pixels.reshape(25, 32, 40, 32, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, 32, 32)


if __name__ == "__main__":
    sys.exit(main())
