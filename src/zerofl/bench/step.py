"""`zerofl bench step` and `zerofl bench layers`: a training step on the native kernels beside dense PyTorch's.

All is measured in processes of their own: the instruction set can only be chosen before PyTorch is imported, and peak
memory is only seen in a process that has done nothing else.
"""

import copy
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zerofl.bench.memory import peak_memory, reset_peak_memory
from zerofl.bench.process import in_own_process
from zerofl.errors import ZeroFLError
from zerofl.models import build_model
from zerofl.run.console import Table
from zerofl.run.origin import origin
from zerofl.sparse import dispatch, kernels
from zerofl.sparse.layers import Backend
from zerofl.sparse.sparsify import sparse_layers, sparsify_

try:
    import sparseprop.modules as sparseprop
except ImportError:
    sparseprop = None

# What keeps PyTorch, oneDNN and MKL to an instruction set, and ours.
ISAS = {
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ZEROFL_ISA": "avx2",
    },
}
SHAPES = {"resnet18": (10, 3, 32), "leaf_cnn": (62, 1, 28)}  # classes, channels, height and width of the images
PARTS = ("top_k", "packing", "forward", "grad_input", "grad_weight", "normalisation", "optimiser")
SECONDS, LEAST_ROUNDS = 12, 7  # of alternating steps
TOLERANCE = 1e-4  # of the largest entry; what is measured is some 1e-6

Row = dict[str, Any]
T = TypeVar("T")


class Workload(NamedTuple):
    """What a step trains: a model, or one of its sparse layers alone, with an output gradient given."""

    model: str
    batch_size: int
    layer: str = ""


class Step(NamedTuple):
    """A training step that can be repeated, in its parts."""

    module: nn.Module
    input: Tensor
    zero_grad: Callable[[], None]
    backward: Callable[[Tensor], None]
    optimise: Callable[[], None]

    def gradients(self) -> Tensor:
        """All but the update; returns the output."""
        self.zero_grad()
        output: Tensor = self.module(self.input)
        self.backward(output)
        return output

    def run(self) -> None:
        """The whole step."""
        self.gradients()
        self.optimise()


class BenchError(ZeroFLError):
    """Nothing that could be measured: no kernels, or wrong results."""


def bench_step(
    model: str,
    batch_size: int,
    sparsities: Sequence[float],
    threads: int,
    isa: str | None,
    note: Callable[[str], None],
) -> dict[str, Any]:
    """Time training steps (forward, loss, backward, SGD) of a dense model and its sparse ones, one after the other.

    The sparse model is compared with the reference first. `isa` keeps both to an instruction set. `note` is told what
    is going on.

    Returns:
        the machine, the settings and `rows`, one for each sparsity, with the medians `dense_seconds` and
        `sparse_seconds`, their ratio `speedup`, the most memory that a step takes beyond the model's own
        (`dense_peak_bytes`, `sparse_peak_bytes`; None where the system does not tell), the seconds of the sparse step
        by `PARTS` and "other" (`breakdown`), and the largest deviations from the reference relative to the largest
        entry (`output_error`, `gradient_error`).

    Raises:
        BenchError: there are no kernels, or they deviate from the reference by more than `TOLERANCE`.
    """
    return _result([Workload(model, batch_size)], sparsities, threads, isa, note)


def bench_layers(
    model: str,
    batch_size: int,
    sparsities: Sequence[float],
    threads: int,
    isa: str | None,
    note: Callable[[str], None],
) -> dict[str, Any]:
    """`bench_step` for each sparse layer by itself, forward and backward; layers of one shape are measured once.

    Rows have the `layers` too, and `sparseprop_seconds`, which is None where SparseProp is not installed. SparseProp
    packs its weights before, and its time is that of the faster of its two kernels.
    """
    workloads = [Workload(model, batch_size, names[0]) for names in _alike_layers(model, batch_size)]
    return _result(workloads, sparsities, threads, isa, note)


def step_table(result: dict[str, Any]) -> Table:
    """The rows for reading, in milliseconds and MB of 10^6 bytes."""
    of_layers = "layers" in result["rows"][0]
    columns = [*(["layer"] if of_layers else []), "sparsity", "speed-up", "dense ms", "sparse ms",
               *(["SparseProp ms", "times"] if of_layers else []), "dense MB", "sparse MB",
               *(part.replace("_", " ") for part in (*PARTS, "other"))]  # fmt: skip
    rows = [
        [
            *([row["layers"][0]] if of_layers else []),
            f"{row['sparsity']:.0%}",
            f"{row['speedup']:.2f}",
            *(f"{row[key] * 1e3:.1f}" for key in ("dense_seconds", "sparse_seconds")),
            *([_number(row["sparseprop_seconds"], 1e3), str(len(row["layers"]))] if of_layers else []),
            *(_number(row[key], 1e-6) for key in ("dense_peak_bytes", "sparse_peak_bytes")),
            *(f"{row['breakdown'][part] * 1e3:.1f}" for part in (*PARTS, "other")),
        ]
        for row in result["rows"]
    ]
    return Table(columns, rows, keys=2 if of_layers else 1)


def _number(value: float | None, factor: float) -> str:
    return "-" if value is None else f"{value * factor:.1f}"


def _result(
    workloads: Sequence[Workload],
    sparsities: Sequence[float],
    threads: int,
    isa: str | None,
    note: Callable[[str], None],
) -> dict[str, Any]:
    if dispatch.UNAVAILABLE:
        raise BenchError(f"the native kernels are not installed ({dispatch.UNAVAILABLE}); there is nothing to measure")
    rows = []
    for workload in workloads:
        what = " ".join(filter(None, (workload.model, workload.layer)))
        note(f"{what}: checking and timing, batch {workload.batch_size}")
        timed = _in_own_process(isa, _measure, workload, sparsities, threads)
        note(f"{what}: peak memory")
        dense_peak_bytes = _in_own_process(isa, _peak_bytes, workload, None, threads)
        for row in timed:
            sparse_peak_bytes = _in_own_process(isa, _peak_bytes, workload, row["sparsity"], threads)
            rows.append(row | {"dense_peak_bytes": dense_peak_bytes, "sparse_peak_bytes": sparse_peak_bytes})
    return {
        **origin(),
        "isa": isa or "all",
        "threads": threads,
        "model": workloads[0].model,
        "batch_size": workloads[0].batch_size,
        "rows": rows,
    }


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


def _alike_layers(model: str, batch_size: int) -> list[list[str]]:
    """The names of the sparse layers, those of the same shape together."""
    alike: dict[str, list[str]] = defaultdict(list)
    for name, shape in _input_shapes(model, batch_size).items():
        alike[f"{_dense_model(model).get_submodule(name)} {shape}"].append(name)
    return list(alike.values())


def _input_shapes(model: str, batch_size: int) -> dict[str, torch.Size]:
    """The shape of each sparse layer's input, by the layer's name."""
    shapes: dict[str, torch.Size] = {}
    module = _dense_model(model)
    for name in module.sparse_layers:  # type: ignore[union-attr]
        layer = module.get_submodule(name)
        layer.register_forward_hook(lambda _, inputs, __, name=name: shapes.update({name: inputs[0].shape}))
    _, channels, side = SHAPES[model]
    with torch.no_grad():
        module.eval()(torch.zeros(batch_size, channels, side, side))
    return shapes


def _dense_model(model: str) -> nn.Module:
    classes, channels, _ = SHAPES[model]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_model(model, classes, channels, width=64)


def _make_step(
    workload: Workload,
    sparsity: float | None,
    backend: Backend = "auto",
    memory_format: torch.memory_format = torch.channels_last,
) -> Step:
    """A step of the dense workload (`sparsity` None, in PyTorch's `memory_format`) or a sparse one."""
    generator = torch.Generator().manual_seed(0)
    classes, channels, side = SHAPES[workload.model]
    module = _dense_model(workload.model)
    if workload.layer:
        layer, shape = module.get_submodule(workload.layer), _input_shapes(*workload[:2])[workload.layer]
        module = nn.Sequential(layer)
        input = torch.randn(shape, generator=generator).relu()
    else:
        input = torch.rand(workload.batch_size, channels, side, side, generator=generator)
    if sparsity is None:
        module = module.to(memory_format=memory_format)  # type: ignore[call-overload]
    else:
        sparsify_(module, sparsity, layers=["0"] if workload.layer else None, backend=backend)

    def laid_out(x: Tensor) -> Tensor:
        """As the layer before or behind would hand it over."""
        if x.dim() != 4:
            return x
        if sparsity is None:
            return x.contiguous(memory_format=memory_format)
        return kernels.batch_first(kernels.batch_innermost(x))

    if workload.layer:
        grad_output = laid_out(torch.randn(module(input).shape, generator=generator))
        input = laid_out(input).requires_grad_()

        def zero_grad() -> None:
            module.zero_grad()
            input.grad = None

        return Step(module, input, zero_grad, lambda output: torch.autograd.backward(output, grad_output), lambda: None)

    labels = torch.randint(0, classes, (workload.batch_size,), generator=generator)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)

    return Step(
        module,
        laid_out(input) if sparsity is None else input,
        optimizer.zero_grad,
        lambda output: torch.autograd.backward(F.cross_entropy(output, labels)),
        optimizer.step,
    )


def _measure(workload: Workload, sparsities: Sequence[float], threads: int) -> list[Row]:
    """Rows without the peak memory; in a process of its own."""
    torch.set_num_threads(threads)
    errors = [_check(workload, sparsity) for sparsity in sparsities]
    layouts = (torch.channels_last, torch.contiguous_format)
    dense = [_make_step(workload, None, memory_format=layout) for layout in layouts]
    seconds_of_layouts = _alternate([step.run for step in dense], seconds=0)
    dense_step = min(zip(seconds_of_layouts, dense, layouts, strict=True), key=lambda each: each[0])
    steps = [_make_step(workload, sparsity) for sparsity in sparsities]
    others = [run for sparsity in sparsities for run in _sparseprop_runs(workload, sparsity)]
    dense_seconds, *seconds = _alternate([dense_step[1].run, *(step.run for step in steps), *others], SECONDS)
    rows = []
    for i, (sparsity, step) in enumerate(zip(sparsities, steps, strict=True)):
        row = {
            "sparsity": sparsity,
            "dense_seconds": dense_seconds,
            "dense_layout": str(dense_step[2]).removeprefix("torch."),
            "sparse_seconds": seconds[i],
            "speedup": dense_seconds / seconds[i],
            "breakdown": _breakdown(step),
            "isa": dispatch.isa(),
            **errors[i],
        }
        if workload.layer:
            per_sparsity = len(others) // len(sparsities)
            own = seconds[len(steps) + i * per_sparsity :][:per_sparsity]
            row["layers"] = next(names for names in _alike_layers(*workload[:2]) if workload.layer in names)
            row["sparseprop_seconds"] = min(own, default=None)
        rows.append(row)
    return rows


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


def _check(workload: Workload, sparsity: float) -> Row:
    """The largest deviations from the reference, relative to the largest entry.

    The output is the whole workload's. The gradients are each sparse layer's from the same input and output gradient:
    through a whole network, rounding decides which way a ReLU or a top-k goes, and one that differs changes everything
    before it.
    """
    native_step, step = (_make_step(workload, sparsity, backend) for backend in ("native", "reference"))
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
    for name, layer in sparse_layers(native_step.module):
        input, layer_output = seen[name]
        gradients = []
        for each in (layer, step.module.get_submodule(name)):
            each.zero_grad()
            x = input.clone().requires_grad_()
            each(x).backward(layer_output.grad)
            gradients.append([x.grad, *(parameter.grad for parameter in each.parameters())])
        gradient_errors += [_deviation(a, b) for a, b in zip(*gradients, strict=True)]
    errors = {"output_error": _deviation(native_step.gradients(), output), "gradient_error": max(gradient_errors)}
    if not max(errors.values()) <= TOLERANCE:
        raise BenchError(f"{workload} at {sparsity:.0%} deviates from the reference: {errors}")
    return errors


def _deviation(x: Tensor, expected: Tensor) -> float:
    return ((x - expected).abs().max() / expected.abs().max()).item()


def _sparseprop_runs(workload: Workload, sparsity: float) -> list[Callable[[], object]]:
    """Forward and backward of a layer on SparseProp's kernels, vectorised over the width and over the batch."""
    if sparseprop is None or not workload.layer:
        return []
    return [_sparseprop_run(workload, sparsity, over_width) for over_width in (False, True)]


def _sparseprop_run(workload: Workload, sparsity: float, over_width: bool) -> Callable[[], object]:
    dense = copy.deepcopy(_make_step(workload, None))
    layer: Any = dense.module.get_submodule("0")
    threshold = kernels.top_k_threshold(
        layer.weight.detach().contiguous(), round((1 - sparsity) * layer.weight.numel())
    )
    layer.weight.data = torch.where(layer.weight.abs() < threshold, 0.0, layer.weight).detach().contiguous()
    if isinstance(layer, nn.Linear):
        sparse = sparseprop.SparseLinear.from_dense(layer)
    else:
        sparse = sparseprop.SparseConv2d.from_dense(layer, vectorizing_over_on=over_width)
    input = dense.input.detach().contiguous()
    grad_output = torch.randn(dense.module(dense.input).shape)
    if not over_width and input.dim() == 4:  # it takes these without moving them
        input, grad_output = (kernels.batch_first(kernels.batch_innermost(x)) for x in (input, grad_output))
    input.requires_grad_()

    def run() -> None:
        sparse.zero_grad()
        input.grad = None
        sparse(input).backward(grad_output)

    return run


def _breakdown(step: Step, repetitions: int = 5) -> dict[str, float]:
    """The seconds that a step spends in each of `PARTS` and in all else."""
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
    return {part: statistics.median(record[part] for record in records) for part in (*PARTS, "other")}


def _peak_bytes(workload: Workload, sparsity: float | None, threads: int) -> int | None:
    """The most memory that steps take beyond the model's own; in a process of its own."""
    torch.set_num_threads(threads)
    _make_step(Workload("resnet18", 2, "layer1.0.conv1"), sparsity).run()  # libraries load lazily
    step = _make_step(workload, sparsity)
    before = reset_peak_memory()
    for _ in range(3):
        step.run()
    return None if before is None else peak_memory() - before
