"""The speed gate: short ratios beside those on record for the same instruction set; fails where one has dropped.

python benchmarks/check.py [--isa avx2]            a minute; status 1 if a ratio is more than 15 % below its record
python benchmarks/check.py [--isa avx2] --write    make the record anew: the medians of three measurements

Each ratio is the time of something that this project does not change over the time of ours, in pairs that alternate in
one process with one thread: dense PyTorch's training step over ours at 95 %, and the compression of a whole model with
zstandard over coding an update of it, reading it, and what a round takes beside training. Times are those of the CPU,
so that other work on the machine does not count but by the caches and the memory that it takes; what only waits is not
seen. What seems to have dropped is measured twice more, and the middle of the three counts, as in the record: a busy
moment passes, a slower program does not. Records: benchmarks/results/check-<instruction set>.json; they are of one
machine, and another one with the same instructions may have other ratios, so there is no verdict there: give it a
record of its own with --record.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import zstandard

from zerofl.bench.process import in_own_process
from zerofl.bench.step import ISAS
from zerofl.bench.workload import Workload, make_step
from zerofl.exchange.uplink import make_update
from zerofl.exchange.wire import decode, encode, schema_of
from zerofl.experiment import Experiment
from zerofl.fl.records import RoundRecord
from zerofl.flower.client_app import app as client_app
from zerofl.flower.engines import run_in_process
from zerofl.flower.server_app import server_app
from zerofl.models import build_model
from zerofl.run.files import write_atomically
from zerofl.run.origin import origin
from zerofl.run.resume import open_run
from zerofl.sparse import dispatch

RESULTS = Path(__file__).parent / "results"
MOST_DROP = 0.15
SECONDS, LEAST_PAIRS = 3, 7  # of alternating pairs
ATTEMPTS = 3  # measurements of which the middle one counts
SPARSITY = 0.95

Ratios = dict[str, float]
Measure = Callable[[], Ratios]


def steps(model: str, batch_size: int) -> Ratios:
    """A training step: dense PyTorch's, in the faster of its layouts, over ours."""
    torch.set_num_threads(1)
    workload = Workload(model, batch_size)
    layouts = [make_step(workload, None, memory_format=f).run for f in (torch.channels_last, torch.contiguous_format)]
    dense = min(layouts, key=lambda run: min(seconds(run) for _ in range(3)))
    ours = make_step(workload, SPARSITY).run
    return {f"step of {model}": paired(dense, ours)}


def coding(mask_ratio: float) -> Ratios:
    """Coding an update of ResNet-18 and reading it: compressing the model's bytes over each."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    model = build_model("resnet18", 10, 3, width=64)
    sparse = [f"{name}.weight" for name in model.sparse_layers]
    received = {name: value.clone() for name, value in model.state_dict().items()}
    trained = {
        name: value + 0.01 * torch.randn(value.shape, generator=generator) if value.is_floating_point() else value
        for name, value in received.items()
    }
    schema = schema_of(received)
    update = make_update("top_k_weights", received, trained, sparse, SPARSITY, mask_ratio)
    payload = encode(update, schema)
    return {
        f"encode, mask ratio {mask_ratio:g}": paired(compress, partial(encode, update, schema)),
        f"decode, mask ratio {mask_ratio:g}": paired(compress, partial(decode, payload, schema)),
    }


def rounds() -> Ratios:
    """What a round with five clients takes beside their training: compressing a model's bytes over that."""
    ratios: list[float] = []
    experiment = Experiment(
        dataset="mnist5k", model="leaf_cnn", clients=50, clients_per_round=5, rounds=LEAST_PAIRS + 2, batch_size=16,
        sparsity=SPARSITY, uplink="top_k_weights_diff", threads=1, clients_at_once=1, evaluate_every=1000,
    )  # fmt: skip

    before = time.process_time()

    def on_round(record: RoundRecord) -> None:
        nonlocal before
        beside_training = time.process_time() - before - (record.train_cpu_seconds or 0.0)
        if 1 < record.round < experiment.rounds:  # the first one loads, the last one evaluates
            ratios.append(seconds(compress) / beside_training)
        before = time.process_time()

    with tempfile.TemporaryDirectory() as folder:
        app = server_app(experiment, Path(folder), open_run(Path(folder), experiment), on_round)
        run_in_process(app, client_app, experiment)
    return {"overhead of a round": median(ratios)}


MEASURES: tuple[Measure, ...] = (
    partial(steps, "resnet18", 8),
    partial(steps, "leaf_cnn", 20),
    partial(coding, 0.0),
    partial(coding, 0.2),
    rounds,
)


def compress() -> bytes:
    """The work that stands for this machine's speed: random floats, as many as ResNet-18 has parameters."""
    return zstandard.ZstdCompressor(level=3).compress(FLOATS)


FLOATS = torch.randn(11_183_562, generator=torch.Generator().manual_seed(0)).numpy().tobytes()


def paired(reference: Callable[[], object], ours: Callable[[], object]) -> float:
    """How many times as long the reference takes: the median of pairs, one after the other."""
    reference(), ours()
    ratios, started = list[float](), time.process_time()
    while time.process_time() - started < SECONDS or len(ratios) < LEAST_PAIRS:
        ratios.append(seconds(reference) / seconds(ours))
    return median(ratios)


def seconds(run: Callable[[], object]) -> float:
    """The CPU time of one run."""
    started = time.process_time()
    run()
    return time.process_time() - started


def measured(measures: Sequence[Measure]) -> list[Ratios]:
    """The ratios of each, in one process that is not this one: PyTorch's instructions are chosen when it starts."""
    return in_own_process(_measured, measures)


def _measured(measures: Sequence[Measure]) -> list[Ratios]:
    found = []
    for measure in measures:
        found.append(measure())
        print("".join(f"measured: {name} {ratio:.2f}\n" for name, ratio in found[-1].items()), end="", file=sys.stderr)
    return found


def drops(record: Ratios, now: Ratios) -> Ratios:
    """By how much each ratio on record has dropped: 0.15 is to 85 % of it. Those that are not there are gone: 1."""
    return {name: 1 - now.get(name, 0.0) / ratio for name, ratio in record.items()}


def check(record: Ratios) -> Ratios:
    """The ratios now; what seems to have dropped too far is measured twice more, and the middle one counts."""
    found = [[ratios] for ratios in measured(MEASURES)]
    dropped = drops(record, middle(found))
    again = [k for k, (ratios,) in enumerate(found) if any(dropped.get(name, 0.0) > MOST_DROP for name in ratios)]
    for _ in range(ATTEMPTS - 1 if again else 0):
        for k, ratios in zip(again, measured([MEASURES[k] for k in again]), strict=True):
            found[k].append(ratios)
    return middle(found)


def middle(found: Iterable[Sequence[Ratios]]) -> Ratios:
    """The median of each ratio, of what each measure found in its attempts."""
    return {name: median(ratios[name] for ratios in of) for of in found for name in of[0]}


def main() -> int:
    """Check against the record, or write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", choices=tuple(ISAS), help="keep PyTorch and the kernels to these instructions")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--record", metavar="FILE", type=Path, help="default: the one of the instruction set")
    options = parser.parse_args()
    os.environ.update(ISAS[options.isa] if options.isa else {})  # for the processes that measure
    isa = in_own_process(dispatch.isa)
    path = options.record or RESULTS / f"check-{isa}.json"
    if options.write:
        ratios = middle(zip(*(measured(MEASURES) for _ in range(ATTEMPTS)), strict=True))
        result: dict[str, Any] = {**origin(), "isa": isa, "threads": 1, "ratios": ratios}
        write_atomically(path, (json.dumps(result, indent=1) + "\n").encode())
        print("\n".join(f"{name:28} {ratio:7.2f}" for name, ratio in ratios.items()))
        return 0
    if not path.exists():
        print(f"{path}: there is no record of {isa}: make one on a commit that is known to be fast, with --write")
        return 1
    record = json.loads(path.read_text(encoding="utf-8"))
    if record["isa"] != isa:
        print(f"{path} is of {record['isa']}, here is {isa}: give one of {isa}, or its instructions with --isa")
        return 1
    now = check(record["ratios"])
    return verdict(record, now)


def verdict(record: dict[str, Any], now: Ratios) -> int:
    """Print every ratio beside its record; 1, and the three worst, if one has dropped too far. Only on its machine."""
    dropped = drops(record["ratios"], now)
    for name, drop in dropped.items():
        print(f"{name:28} {now.get(name, 0.0):7.2f}   on record {record['ratios'][name]:7.2f}   {-drop:+6.1%}")
    if record["machine"] != (here := origin()["machine"]):
        print(f"no verdict: the record is of another machine, {record['machine']}; this is {here}")
        return 0
    if faster := [name for name, drop in dropped.items() if drop < -MOST_DROP]:
        print(
            f"faster than on record by more than {MOST_DROP:.0%}, so that a drop back would not be seen: "
            f"{', '.join(faster)}; on a quiet machine make the record anew with --write"
        )
    worst = sorted(dropped, key=lambda name: -dropped[name])[:3]
    if dropped[worst[0]] <= MOST_DROP:
        print(f"as fast as on record: nothing is more than {MOST_DROP:.0%} below")
        return 0
    print(f"slower than on record by more than {MOST_DROP:.0%}; the three worst: {', '.join(worst)}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
