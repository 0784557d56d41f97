"""`zerofl bench step` and `zerofl bench layers`: a training step on the native kernels beside dense PyTorch's.

All is measured in processes of their own: the instruction set can only be chosen before PyTorch is imported, and peak
memory is only seen in a process that has done nothing else.
"""

import copy
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from zerofl.bench.memory import peak_memory, reset_peak_memory
from zerofl.bench.process import in_own_process
from zerofl.bench.workload import Step, Workload, alike_layers, has_normalisation, make_step, sparseprop_runs
from zerofl.errors import ZeroFLError
from zerofl.fl import energy
from zerofl.run.console import Table
from zerofl.run.origin import origin
from zerofl.sparse import dispatch
from zerofl.sparse.layers import Backend
from zerofl.sparse.sparsify import sparse_layers

# What keeps PyTorch, oneDNN and MKL to an instruction set, and ours.
ISAS = {
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ZEROFL_ISA": "avx2",
    },
}
SECONDS, LEAST_ROUNDS = 12, 7  # of alternating steps
ENERGY_SECONDS = 3  # of the same step, for its energy: of CPU time Linux counts hundredths of seconds
TOLERANCE = 1e-4  # of the largest entry; what is measured is some 1e-6
# Of the output where 16 bits are stored: a difference in the last bit of float32 may round to the next 16-bit number.
STORED_TOLERANCE = {"float32": TOLERANCE, "float16": 5e-3, "bfloat16": 4e-2}

Row = dict[str, Any]
T = TypeVar("T")


class BenchError(ZeroFLError):
    """Nothing that could be measured: no kernels, or wrong results."""


def bench_step(
    model: str,
    batch_size: int,
    sparsities: Sequence[float],
    threads: int,
    isa: str | None,
    note: Callable[[str], None],
    layers: bool = False,
    storage: str = "float32",
    compiled: bool = False,
    watts_per_core: float = 0.0,
) -> dict[str, Any]:
    """Time training steps (forward, loss, backward, SGD) of a dense model and its sparse ones, one after the other.

    Dense is the faster of PyTorch's layouts, channels_last and contiguous. Of a whole model that one is timed in
    bfloat16 autocast too, another precision than ours, where the processor multiplies it in tiles (AMX), and with
    `compiled` under torch.compile. `storage` is that of `zerofl.sparsify_`.

    The sparse model is compared with the reference first. `isa` keeps both to an instruction set. `note` gets a line
    for each step. With `layers` each sparse layer is measured by itself, forward and backward, one of each shape.
    `watts_per_core` is what a busy core takes, for an estimate of a step's energy; 0 for none.

    Returns:
        the machine, the settings and `rows`, one for each sparsity, with the medians `dense_seconds` and
        `sparse_seconds`, their ratio `speedup`, `compiled_seconds` and `bfloat16_seconds` (None where not timed;
        `compile_error` is what torch.compile said if it failed), the `layout_seconds` of a first look at both layouts,
        the most memory that a step takes beyond the model's own
        (`dense_peak_bytes`, `sparse_peak_bytes`; None where the system does not tell), the energy of a step in joules
        (`dense_joules`, `sparse_joules`, None where it cannot be measured, and the same with `_estimate`, None without
        watts; `energy` of the whole says what they are), the seconds of the sparse step by part, "optimiser" and
        "other" (`breakdown`), and the largest deviations from the reference relative to the largest entry
        (`output_error`, `gradient_error`). Of layers also which `layers` are alike, and `sparseprop_seconds`, None
        where SparseProp is not installed: the time of the faster of its two kernels, which pack their weights before.

    Raises:
        BenchError: there are no kernels, or they deviate from the reference by more than `TOLERANCE`.
    """
    if dispatch.UNAVAILABLE:
        raise BenchError(f"the native kernels are not installed ({dispatch.UNAVAILABLE}); there is nothing to measure")
    if storage != "float32" and not has_normalisation(model):
        raise BenchError(f"storage {storage}: it is of what batch normalisation reads, and {model} has none")
    rows = []
    names = [alike[0] for alike in alike_layers(model, batch_size)] if layers else [""]
    for workload in (Workload(model, batch_size, name) for name in names):
        what = " ".join(filter(None, (model, workload.layer)))
        note(f"{what}: checking and timing, batch {batch_size}")
        timed = _in_own_process(isa, _measure, workload, sparsities, threads, storage, compiled, watts_per_core)
        note(f"{what}: peak memory")
        dense_peak_bytes = _in_own_process(isa, _peak_bytes, workload, None, threads)
        for row in timed:
            sparse_peak_bytes = _in_own_process(isa, _peak_bytes, workload, row["sparsity"], threads, storage)
            rows.append(row | {"dense_peak_bytes": dense_peak_bytes, "sparse_peak_bytes": sparse_peak_bytes})
    return {
        **origin(),
        "isa": isa or "all",
        "threads": threads,
        "model": model,
        "batch_size": batch_size,
        "storage": storage,
        "energy": energy.described(
            rows[0]["dense_joules"],
            rows[0]["dense_joules_estimate"],
            watts_per_core,
            f"{energy.why_not()}; --watts-per-core gives an estimate",
        ),
        "rows": rows,
    }


def step_table(result: dict[str, Any]) -> Table:
    """The rows for reading, in milliseconds and MB of 10^6 bytes."""
    of_layers = "layers" in result["rows"][0]
    others = [key for key in ("compiled", "bfloat16") if result["rows"][0][f"{key}_seconds"] is not None]
    joules = [
        (f"{kind}_joules{suffix}", f"{kind} J{word}")
        for suffix, word in (("", ""), ("_estimate", " (estimate)"))
        for kind in ("dense", "sparse")
        if result["rows"][0][f"{kind}_joules{suffix}"] is not None
    ]
    columns = [*(["layer"] if of_layers else []), "sparsity", "speed-up", "dense ms", "sparse ms",
               *(f"dense {key} ms" for key in others),
               *(["SparseProp ms", "times"] if of_layers else []), "dense MB", "sparse MB",
               *(column for _, column in joules),
               *(part.replace("_", " ") for part in result["rows"][0]["breakdown"])]  # fmt: skip
    rows = [
        [
            *([row["layers"][0]] if of_layers else []),
            f"{row['sparsity']:.0%}",
            f"{row['speedup']:.2f}",
            *(f"{row[key] * 1e3:.1f}" for key in ("dense_seconds", "sparse_seconds")),
            *(_number(row[f"{key}_seconds"], 1e3) for key in others),
            *([_number(row["sparseprop_seconds"], 1e3), str(len(row["layers"]))] if of_layers else []),
            *(_number(row[key], 1e-6) for key in ("dense_peak_bytes", "sparse_peak_bytes")),
            *(f"{row[key]:.3f}" for key, _ in joules),
            *(f"{seconds * 1e3:.1f}" for seconds in row["breakdown"].values()),
        ]
        for row in result["rows"]
    ]
    return Table(columns, rows, keys=2 if of_layers else 1)


def what_was_compared(result: dict[str, Any]) -> str:
    """What the columns are, in a sentence for below the table."""
    row = result["rows"][0]
    dense = f"dense: PyTorch {torch.__version__}, float32, the faster of its layouts here ({row['dense_layout']})"
    if row["compiled_seconds"] is not None:
        dense += "; compiled: the same under torch.compile"
    elif row["compile_error"]:
        dense += f"; torch.compile failed: {row['compile_error']}"
    if row["bfloat16_seconds"] is not None:
        dense += "; bfloat16: dense autocast, which is another precision"
    ours = "sparse: this package's kernels, float32"
    return f"{dense}; {ours}" + ("" if result["storage"] == "float32" else f", stored as {result['storage']}")


def _number(value: float | None, factor: float) -> str:
    return "-" if value is None else f"{value * factor:.1f}"


def _in_own_process(isa: str | None, function: Callable[..., T], *arguments: Any) -> T:
    """The function's result in a fresh process, with PyTorch and the kernels kept to `isa` if it is given."""
    settings = ISAS[isa] if isa else {}
    before = {key: os.environ.get(key) for key in settings}
    os.environ.update(settings)
    try:
        return in_own_process(function, *arguments)
    finally:
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})


def _measure(
    workload: Workload, sparsities: Sequence[float], threads: int, storage: str, compiled: bool, watts_per_core: float
) -> list[Row]:
    """Rows without the peak memory; in a process of its own."""
    torch.set_num_threads(threads)
    errors = [_check(workload, sparsity, storage) for sparsity in sparsities]
    layouts, names = (torch.channels_last, torch.contiguous_format), ("channels_last", "contiguous_format")
    dense = [make_step(workload, None, memory_format=layout) for layout in layouts]
    seconds_of_layouts = _alternate([step.run for step in dense], seconds=0)
    dense_step = min(zip(seconds_of_layouts, dense, layouts, strict=True), key=lambda each: each[0])
    steps = [make_step(workload, sparsity, storage=storage) for sparsity in sparsities]
    more, compile_error = {}, None
    if compiled:
        run = make_step(workload, None, memory_format=dense_step[2], compiled=True).run
        try:
            run()
            more["compiled_seconds"] = run
        except torch._dynamo.exc.TorchDynamoException as error:  # most often there is no C++ compiler
            compile_error = str(error).strip().partition("\n")[0]
    if not workload.layer and _multiplies_bfloat16():
        more["bfloat16_seconds"] = make_step(workload, None, memory_format=dense_step[2], autocast=True).run
    others = [run for sparsity in sparsities for run in sparseprop_runs(workload, sparsity)]
    times = _alternate([dense_step[1].run, *(step.run for step in steps), *others, *more.values()], SECONDS)
    dense_seconds, seconds = times[0], times[1 : len(times) - len(more)]
    dense_others = dict.fromkeys(("compiled_seconds", "bfloat16_seconds")) | dict(
        zip(more, times[len(times) - len(more) :], strict=True)
    )
    dense_joules = _joules(dense_step[1].run, watts_per_core, "dense")
    rows = []
    for i, (sparsity, step) in enumerate(zip(sparsities, steps, strict=True)):
        row = {
            "sparsity": sparsity,
            "dense_seconds": dense_seconds,
            "dense_layout": names[layouts.index(dense_step[2])],
            "layout_seconds": dict(zip(names, seconds_of_layouts, strict=True)),
            **dense_others,
            "compile_error": compile_error,
            "sparse_seconds": seconds[i],
            "speedup": dense_seconds / seconds[i],
            **dense_joules,
            **_joules(step.run, watts_per_core, "sparse"),
            "breakdown": _breakdown(step),
            "isa": dispatch.isa(),
            **errors[i],
        }
        if workload.layer:
            per_sparsity = len(others) // len(sparsities)
            own = seconds[len(steps) + i * per_sparsity :][:per_sparsity]
            row["layers"] = next(names for names in alike_layers(*workload[:2]) if workload.layer in names)
            row["sparseprop_seconds"] = min(own, default=None)
        rows.append(row)
    return rows


def _multiplies_bfloat16() -> bool:
    """Whether the processor has tiles for products in bfloat16 (AMX)."""
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())  # as of torch 2.6


def _alternate(runs: Sequence[Callable[[], object]], seconds: float) -> list[float]:
    """The median time of each, run one after the other again and again."""
    times: list[list[float]] = [[] for _ in runs]
    for run in runs:
        run()
    started = time.perf_counter()
    while time.perf_counter() - started < seconds or len(times[0]) < LEAST_ROUNDS:
        for run, own in zip(runs, times, strict=True):
            before = time.perf_counter()
            run()
            own.append(time.perf_counter() - before)
    return [statistics.median(own) for own in times]


def _joules(run: Callable[[], object], watts_per_core: float, kind: str) -> dict[str, float | None]:
    """The energy of one run, from many of them one after the other, as the keys of a row."""
    before, runs, started, cpu_started = energy.read(), 0, time.perf_counter(), time.process_time()
    while (before or watts_per_core) and (not runs or time.perf_counter() - started < ENERGY_SECONDS):
        run()
        runs += 1
    cpu_seconds = time.process_time() - cpu_started
    measured = energy.joules(before, energy.read(), cpu_seconds)
    estimate = energy.joules_estimate(cpu_seconds, watts_per_core)
    return {
        f"{kind}_joules": None if measured is None else measured / runs,
        f"{kind}_joules_estimate": None if estimate is None else estimate / runs,
    }


def _check(workload: Workload, sparsity: float, storage: str) -> Row:
    """The largest deviations from the reference, relative to the largest entry.

    The output is the whole workload's. The gradients are each sparse layer's from the same input and output gradient:
    through a whole network, rounding decides which way a ReLU or a top-k goes, and one that differs changes everything
    before it.
    """
    backends: tuple[Backend, Backend] = ("native", "reference")
    native_step, step = (make_step(workload, sparsity, backend, storage=storage) for backend in backends)
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def see(name: str, input: Tensor, output: Tensor | tuple[Tensor, Tensor]) -> None:
        output = output[0] if isinstance(output, tuple) else output
        output.retain_grad()
        seen[name] = input.detach(), output

    for name, layer in sparse_layers(step.module):
        layer.register_forward_hook(lambda _, inputs, output, name=name: see(name, inputs[0], output))
    output = step.module(step.input)
    step.backward(output)
    gradient_errors = []
    for name, layer in sparse_layers(copy.deepcopy(native_step.module)):  # a copy, whose optimiser takes no step
        input, layer_output = seen[name]
        gradients = []
        for each in (layer, step.module.get_submodule(name)):
            each.zero_grad()
            x = input.clone().requires_grad_()
            each(x).backward(layer_output.grad)
            gradients.append([x.grad, *(parameter.grad for parameter in each.parameters())])
        gradient_errors += [_deviation(a, b) for a, b in zip(*gradients, strict=True)]
    # As torch's maximum is, NaN if any is: Python's max passes over it.
    gradient_error = torch.tensor(gradient_errors, dtype=torch.float64).max().item()
    errors = {"output_error": _deviation(native_step.gradients(), output), "gradient_error": gradient_error}
    if not (errors["output_error"] <= STORED_TOLERANCE[storage] and errors["gradient_error"] <= TOLERANCE):
        raise BenchError(f"{workload} at {sparsity:.0%} deviates from the reference: {errors}")
    return errors


def _deviation(x: Tensor, expected: Tensor) -> float:
    return ((x - expected).abs().max() / expected.abs().max()).item()


def _breakdown(step: Step, repetitions: int = 5) -> dict[str, float]:
    """The seconds that a step spends in each part of the kernels, in the optimiser, and in all else."""
    records = []
    for _ in range(repetitions):
        dispatch.native.seconds()
        started = time.perf_counter()
        step.gradients()
        optimiser_started = time.perf_counter()
        step.optimise()
        ended = time.perf_counter()
        seconds = dispatch.native.seconds() | {"optimiser": ended - optimiser_started}
        records.append(seconds | {"other": ended - started - sum(seconds.values())})
    return {part: statistics.median(record[part] for record in records) for part in records[0]}


def _peak_bytes(workload: Workload, sparsity: float | None, threads: int, storage: str = "float32") -> int | None:
    """The most memory that steps take beyond the model's own; in a process of its own."""
    torch.set_num_threads(threads)
    make_step(Workload("resnet18", 2, "layer1.0.conv1"), sparsity).run()  # libraries load lazily
    step = make_step(workload, sparsity, storage=storage)
    before = reset_peak_memory()
    for _ in range(3):
        step.run()
    return None if before is None else peak_memory() - before
