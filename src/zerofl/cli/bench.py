"""`zerofl bench`: what training and the wire take here."""

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from zerofl.cli.values import positive, sparsity, watts

if TYPE_CHECKING:
    from zerofl.run.console import Output

BENCH_MODELS, BENCH_ISAS = ("resnet18", "leaf_cnn"), ("avx2",)
BENCH_STORAGES = ("float32", "float16", "bfloat16")
"""The choices, without importing PyTorch; a test compares them with what there is."""


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the commands."""
    bench = commands.add_parser("bench", help="measure").add_subparsers(title="benchmarks", required=True)
    uplink = bench.add_parser(
        "uplink",
        help="the bytes and times of a real trained update on the wire",
        description="Train ResNet-18 on one client and put its update on the wire in every way; about 2 minutes.",
    )
    uplink.add_argument("--root", metavar="DIR", help="CIFAR-10's folder or archive (default: train on mnist5k)")
    uplink.add_argument(
        "--rounds", type=int, default=0, metavar="N", help="of two clients before it (default: from the initial model)"
    )
    uplink.add_argument("--json", metavar="FILE", type=Path, help="also write the figures to a file")
    uplink.set_defaults(command=_bench_uplink)
    for name, help in (
        ("step", "a training step on the native kernels beside dense PyTorch's: time and peak memory"),
        ("layers", "the same for each sparse layer alone, beside SparseProp where it is installed"),
    ):
        step = bench.add_parser(name, help=help, description=f"Measure {help}.")
        step.add_argument("--model", choices=BENCH_MODELS, default="resnet18", help="default: %(default)s")
        step.add_argument("--batch-size", type=positive, default=32, metavar="N", help="default: %(default)s")
        step.add_argument(
            "--sparsity", type=sparsity, nargs="+", default=[0.9, 0.95], metavar="S", help="default: 0.9 0.95"
        )
        step.add_argument("--threads", type=positive, metavar="N", help="default: as many as PyTorch chooses")
        step.add_argument("--isa", choices=BENCH_ISAS, help="keep PyTorch and the kernels to these instructions")
        if name == "step":
            step.add_argument(
                "--storage",
                choices=BENCH_STORAGES,
                default="float32",
                help="how what batch normalisation reads is stored; default: %(default)s",
            )
            step.add_argument(
                "--no-compile",
                dest="compiled",
                action="store_false",
                help="leave out dense PyTorch under torch.compile, which takes a minute to compile",
            )
        step.add_argument(
            "--watts-per-core",
            type=watts,
            default=0.0,
            metavar="W",
            help="of a busy core, for an estimate of the energy",
        )
        step.add_argument("--json", metavar="FILE", type=Path, help="also write the figures to a file")
        step.set_defaults(storage="float32", compiled=name == "step", command=_bench_step, benchmark=name)


def _check_json(path: Path | None) -> None:
    """Raise unless a file can be written there, before minutes are spent on what is to stand in it."""
    from zerofl.run.files import ResultsError

    if path is None:
        return
    if path.is_dir():
        raise ResultsError(f"--json {path}: it is a folder; name a file")
    if not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
        raise ResultsError(f"--json {path}: {path.parent} is no folder that can be written; make it, or name another")


def _bench_step(options: argparse.Namespace, console: "Output", errors: "Output") -> int:
    import torch

    from zerofl.bench.step import bench_step, step_table, what_was_compared
    from zerofl.run.files import write_atomically

    _check_json(options.json)
    threads, layers = options.threads or torch.get_num_threads(), options.benchmark == "layers"
    result = bench_step(
        options.model,
        options.batch_size,
        options.sparsity,
        threads,
        options.isa,
        errors.print,
        layers=layers,
        storage=options.storage,
        compiled=options.compiled,
        watts_per_core=options.watts_per_core,
    )
    console.print_table(step_table(result))
    console.print(
        f"{result['model']}, batch {result['batch_size']}, {result['threads']} threads, {result['rows'][0]['isa']}; "
        f"{result['machine']}"
    )
    console.print_prose(what_was_compared(result))
    console.print_prose(f"energy: {result['energy']}")
    if options.json:
        write_atomically(options.json, (json.dumps(result, indent=1) + "\n").encode())
    return 0


def _bench_uplink(options: argparse.Namespace, console: "Output", errors: "Output") -> int:
    from zerofl.bench.uplink import bench_uplink, uplink_table
    from zerofl.run.files import write_atomically

    _check_json(options.json)
    result = bench_uplink(options.root, errors.print, options.rounds)
    console.print_table(uplink_table(result))
    aggregation = result["aggregation"]
    for row in result["training"]:
        console.print(f"local training at {row['sparsity']:.0%}: {row['train_seconds']:.1f} s")
    peak = "not measured" if aggregation["peak_models"] is None else f"{aggregation['peak_models']:.2f} models"
    console.print(f"aggregating {aggregation['updates']} updates: {aggregation['seconds']:.2f} s, peak memory {peak}")
    if options.json:
        write_atomically(options.json, (json.dumps(result, indent=1) + "\n").encode())
    return 0
