"""The command line: `zerofl run`, `report`, `evaluate`, `data` and `bench`."""

import argparse
import contextlib
import importlib.util
import json
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zerofl.run.console import Output

# All but the standard library is imported where it is used: PyTorch takes seconds, `zerofl --help` does without, and an
# interrupt finds `main` ready for it. So the parser's choices stand here; a test compares them.
DATASETS = ("cifar10", "femnist", "mnist5k", "speech_commands", "speech_commands_by_speaker")
FETCHED = ("cifar10", "femnist", "speech_commands")
PARTITIONS = ("lda", "natural")
BENCH_MODELS, BENCH_ISAS = ("resnet18", "leaf_cnn"), ("avx2",)

INTERRUPTED, TERMINATED = 130, 143  # the shell's exit statuses for Ctrl-C and for SIGTERM


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    0 is done; 1 a run failed, or the data set is not the complete published one; 2 it could not be started, or the data
    set not be read; 130 or 143 it was interrupted, by Ctrl-C or by SIGTERM.
    """
    try:
        with _importing():
            from zerofl.run.console import Output

            console, errors = Output(sys.stdout), Output(sys.stderr)
        try:
            return _command(_parser().parse_args(arguments), console, errors)
        finally:
            console.file.flush()  # what argparse prints may have no reader
    except KeyboardInterrupt:
        _say_interrupted()
        return INTERRUPTED


@contextlib.contextmanager
def _importing() -> Iterator[None]:
    """Import something large: an interrupt ends the process at once, as nothing is to be cleaned up.

    An exception would not do: NumPy takes it for a failed part and goes on with half of itself, PyTorch aborts.
    """

    def leave(signum: int, frame: FrameType | None) -> None:
        _say_interrupted()
        os._exit(INTERRUPTED)

    raises = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # in the background it may be ignored
    if raises:
        signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        if raises:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _say_interrupted() -> None:
    with contextlib.suppress(OSError):
        os.write(2, b"zerofl: interrupted\n")  # not through a stream, in which it may have come


def _command(options: argparse.Namespace, console: "Output", errors: "Output") -> int:
    if "torch" not in sys.modules:
        errors.print("loading PyTorch ...")
    with _importing():
        from zerofl.bench.step import BenchError
        from zerofl.data import DatasetError
        from zerofl.experiment import ExperimentError
        from zerofl.run.folder import ResultsError
        from zerofl.sparse.kernels import KernelsError

    try:
        status: int = options.command(options, console, errors)
    except (ExperimentError, DatasetError, ResultsError, BenchError, KernelsError, OSError) as error:
        errors.print(f"zerofl: {error}")
        return 2
    return status


def _parser() -> argparse.ArgumentParser:
    from zerofl import __version__

    parser = argparse.ArgumentParser(prog="zerofl", description="Federated learning with sparse training and uplinks.")
    parser.add_argument("--version", action="version", version=f"zerofl {__version__}")
    commands = parser.add_subparsers(title="commands", required=True)
    run = commands.add_parser(
        "run",
        help="run the experiments of a file or preset",
        description="Run the experiments of a TOML file or preset, one after another; --resume skips finished ones.",
    )
    run.add_argument("experiments", metavar="FILE_OR_PRESET", help="a TOML file, or a preset's name, for example demo")
    run.add_argument("--only", metavar="RUN", action="append", help="only this run of the file (repeatable)")
    run.add_argument(
        "--set",
        metavar="key=value",
        action="append",
        default=[],
        dest="settings",
        help="set a key of every run, for example --set rounds=5 (repeatable)",
    )
    run.add_argument("--root", metavar="DIR", help="where the data set lies; the same as --set root=DIR")
    run.add_argument("--out", metavar="DIR", type=Path, help="where results go (default: runs/<file name>)")
    run.add_argument("--resume", action="store_true", help="go on with what is in the results folder")
    run.add_argument(
        "--engine",
        choices=("in-process", "ray"),
        default="in-process",
        help="what carries the messages (default: %(default)s)",
    )
    run.add_argument("--tensorboard", action="store_true", help="also write TensorBoard events into each run's folder")
    run.set_defaults(command=_run)
    report = commands.add_parser(
        "report",
        help="runs and sweeps as one page, beside the paper's figures",
        description="Make one page, and its tables as Markdown and CSV, of runs' folders or folders of runs.",
    )
    report.add_argument("directories", metavar="RUN_OR_SWEEP_DIR", nargs="+", type=Path, help="for example runs/demo")
    report.add_argument(
        "--out", metavar="FILE", type=Path, default=Path("report.html"), help="the page (default: %(default)s)"
    )
    report.set_defaults(command=_report)
    evaluate = commands.add_parser(
        "evaluate",
        help="a run's final model, with its top-k weights and with all of them",
        description="Evaluate the final model of a run on the test part, sparse as it was trained and dense (§4.3).",
    )
    evaluate.add_argument("directory", metavar="RUN_DIR", type=Path, help="for example runs/demo/zerofl")
    evaluate.add_argument("--root", metavar="DIR", help="where the data set is (default: where the run found it)")
    evaluate.set_defaults(command=_evaluate)
    bench = commands.add_parser("bench", help="measure").add_subparsers(title="benchmarks", required=True)
    uplink = bench.add_parser(
        "uplink",
        help="the bytes and times of a real trained update on the wire",
        description="Train ResNet-18 on one client and put its update on the wire in every way; about 2 minutes.",
    )
    uplink.add_argument("--root", metavar="DIR", help="CIFAR-10's folder or archive (default: train on mnist5k)")
    uplink.add_argument("--json", metavar="FILE", type=Path, help="also write the figures to a file")
    uplink.set_defaults(command=_bench_uplink)
    for name, help in (
        ("step", "a training step on the native kernels beside dense PyTorch's: time and peak memory"),
        ("layers", "the same for each sparse layer alone, beside SparseProp where it is installed"),
    ):
        step = bench.add_parser(name, help=help, description=f"Measure {help}.")
        step.add_argument("--model", choices=BENCH_MODELS, default="resnet18", help="default: %(default)s")
        step.add_argument("--batch-size", type=_positive, default=32, metavar="N", help="default: %(default)s")
        step.add_argument(
            "--sparsity", type=_sparsity, nargs="+", default=[0.9, 0.95], metavar="S", help="default: 0.9 0.95"
        )
        step.add_argument("--threads", type=_positive, metavar="N", help="default: as many as PyTorch chooses")
        step.add_argument("--isa", choices=BENCH_ISAS, help="keep PyTorch and the kernels to these instructions")
        step.add_argument("--json", metavar="FILE", type=Path, help="also write the figures to a file")
        step.set_defaults(command=_bench_step, benchmark=name)
    data = commands.add_parser("data", help="check or download data sets").add_subparsers(
        title="commands", required=True
    )
    check = data.add_parser(
        "check",
        help="what a local data set holds, and whether it is the complete published one",
        description="Show what a local data set and its clients hold. The exit status is 0 for the complete published "
        "data, 1 for any other, and 2 if it cannot be read.",
    )
    check.add_argument("name", metavar="NAME", choices=DATASETS, help=", ".join(DATASETS))
    check.add_argument("--root", metavar="DIR", default="", help="where the data set lies")
    check.add_argument(
        "--partition",
        choices=PARTITIONS,
        help="default: natural where the data set has clients of its own",
    )
    check.add_argument("--clients", type=_positive, metavar="N", help="default: 100, or all natural ones")
    check.add_argument("--alpha", type=float, default=1.0, metavar="A", help="of lda; default: %(default)s")
    check.add_argument("--seed", type=int, default=1, metavar="S", help="of lda; default: %(default)s")
    check.set_defaults(command=_data_check)
    fetching = data.add_parser(
        "fetch",
        help="download a data set from the Hugging Face hub",
        description="Download a data set through flwr-datasets into DIR/NAME/. Nothing else here ever downloads.",
    )
    fetching.add_argument("name", metavar="NAME", choices=FETCHED, help=", ".join(FETCHED))
    fetching.add_argument("--root", metavar="DIR", required=True, help="where to put it; also the --root of a run")
    fetching.set_defaults(command=_data_fetch)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def _sparsity(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a fraction of zeros in [0, 1)")
    return value


def _bench_step(options: argparse.Namespace, console: "Output", errors: "Output") -> int:
    import torch

    from zerofl.bench.step import bench_layers, bench_step, step_table
    from zerofl.run.folder import write_atomically

    measure = {"step": bench_step, "layers": bench_layers}[options.benchmark]
    threads = options.threads or torch.get_num_threads()
    result = measure(options.model, options.batch_size, options.sparsity, threads, options.isa, errors.print)
    console.print_table(step_table(result))
    console.print(
        f"{result['model']}, batch {result['batch_size']}, {result['threads']} threads, {result['rows'][0]['isa']}; "
        f"{result['machine']}"
    )
    if options.json:
        write_atomically(options.json, (json.dumps(result, indent=1) + "\n").encode())
    return 0


def _bench_uplink(options: argparse.Namespace, console: "Output", errors: "Output") -> int:
    from zerofl.bench.uplink import bench_uplink, uplink_table
    from zerofl.run.folder import write_atomically

    result = bench_uplink(options.root, errors.print)
    console.print_table(uplink_table(result))
    aggregation = result["aggregation"]
    for row in result["training"]:
        console.print(f"local training at {row['sparsity']:.0%}: {row['train_seconds']:.1f} s")
    peak = "not measured" if aggregation["peak_models"] is None else f"{aggregation['peak_models']:.2f} models"
    console.print(f"aggregating {aggregation['updates']} updates: {aggregation['seconds']:.2f} s, peak memory {peak}")
    if options.json:
        write_atomically(options.json, (json.dumps(result, indent=1) + "\n").encode())
    return 0


def _evaluate(options: argparse.Namespace, console: "Output", errors: "Output") -> int:
    from zerofl.run.evaluate import evaluate_run

    found = evaluate_run(options.directory, options.root)
    console.print(f"with the top-k weights: accuracy {found.sparse_accuracy:.2%}, loss {found.sparse_loss:.4g}")
    console.print(f"with all weights: accuracy {found.dense_accuracy:.2%}, loss {found.dense_loss:.4g}")
    return 0


def _report(options: argparse.Namespace, console: "Output", errors: "Output") -> int:
    from zerofl.errors import install_hint
    from zerofl.run.folder import ResultsError

    if importlib.util.find_spec("matplotlib") is None:
        raise ResultsError(f"the report's figures need matplotlib: {install_hint('report')}")
    with _importing():
        from zerofl.report.collect import collect
        from zerofl.report.page import check_out, write_report

    check_out(options.out)
    directories = {directory.resolve(): directory for directory in options.directories}  # each once
    files = [path for path in directories.values() if path.is_file()]
    for path in files:  # of a shell's *, beside the folders
        errors.print(f"zerofl: {path} is a file, not the folder of a run or of runs: it is left out")
    if len(files) == len(directories):
        raise ResultsError("there is no folder to report on: expected those of runs, for example runs/demo")
    collections = [collect(directory) for directory in directories.values() if directory not in files]
    for path in write_report(collections, options.out):
        console.print(f"wrote {path}")
    return 0


def _data_check(options: argparse.Namespace, console: "Output", errors: "Output") -> int:
    from zerofl.data import client_indices, load_dataset
    from zerofl.data.check import check_dataset, class_table
    from zerofl.data.tables import CLIENTS_SHOWN, classes_table, client_tables

    name, root = options.name, options.root
    errors.print(f"reading {name} ...")
    report = check_dataset(name, root)
    partition = options.partition or ("natural" if report.natural_clients else "lda")
    clients = options.clients or (report.natural_clients if partition == "natural" else 100)
    try:
        parts = client_indices(name, root, partition, clients, options.alpha, options.seed) if sum(report.train) else []
    except ValueError as error:
        hint = "" if options.clients else "; give their number with --clients N"
        errors.print(f"zerofl: {name}: {error}{hint}")
        return 2
    console.print_table(classes_table(report))
    console.print(f"natural clients: {report.natural_clients or 'none'}")
    console.print(f"checksum: {report.checksum}")
    if parts:
        how = partition if partition == "natural" else f"lda, alpha {options.alpha}, seed {options.seed}"
        console.print(f"\n{len(parts)} clients, {how}: training samples of each class")
        dataset = load_dataset(name, root)
        names = list(dataset.clients) if partition == "natural" else [str(client) for client in range(len(parts))]
        width = console.width if console.is_terminal else None
        for table in client_tables(names, class_table(dataset, parts), dataset.classes, width):
            console.print_table(table)
    if len(parts) > CLIENTS_SHOWN:
        console.print(f"and {len(parts) - CLIENTS_SHOWN} more clients")
    for remark in report.remarks:
        console.print(f"note: {remark}")
    for difference in report.differences:
        console.print(f"not as published: {difference}")
    verdict = "usable, but not the complete published data" if report.differences else "complete, as published"
    console.print(f"{name}: {verdict}")
    return 1 if report.differences else 0


def _data_fetch(options: argparse.Namespace, console: "Output", errors: "Output") -> int:
    from zerofl.data.fetch import fetch

    fetch(options.name, options.root, errors.print)
    console.print(f"check it with: {shlex.join(['zerofl', 'data', 'check', options.name, '--root', options.root])}")
    return 0


def _run(options: argparse.Namespace, console: "Output", errors: "Output") -> int:
    from zerofl.data import load_dataset
    from zerofl.errors import install_hint
    from zerofl.experiment import ExperimentError, parse_setting
    from zerofl.fl.train import check_fits
    from zerofl.run.folder import (
        ROUNDS,
        ResultsError,
        check_run,
        is_finished,
        locked,
        open_run,
        read_lines,
        read_summary,
    )
    from zerofl.run.preflight import check_room, fix_of
    from zerofl.run.progress import RunProgress, opening, summary_table
    from zerofl.run.sweep import find_sweep, keep_sweep, read_sweep
    from zerofl.run.tensorboard import RoundEvents

    settings = dict(parse_setting(setting) for setting in options.settings)
    if options.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ResultsError(f"--tensorboard needs TensorBoard: {install_hint('tensorboard')}")
    if options.root is not None:
        settings["root"] = options.root
    file = find_sweep(options.experiments)
    sweep = read_sweep(file, settings)
    experiments = sweep.experiments()
    named = {row.name: row.experiments for row in sweep.rows} | {name: [e] for name, e in experiments.items()}
    for name in options.only or []:
        if name not in named:
            raise ExperimentError(f"--only {name}: no such run; the runs are {', '.join(experiments)}")
    chosen = [e for name in options.only for e in named[name]] if options.only else list(experiments.values())
    chosen = list(dict.fromkeys(chosen))  # each once, whatever --only says
    out: Path = options.out or Path("runs") / file.stem
    # Before anything is computed: is every data set there and fit for its run, and every folder free or resumable?
    errors.print(f"reading {', '.join(dict.fromkeys(experiment.dataset for experiment in chosen))} ...")
    for experiment in chosen:
        check_fits(experiment, load_dataset(experiment.dataset, experiment.root))
    chosen = [check_run(out / experiment.name, experiment, options.resume) for experiment in chosen]

    # Only now, because importing Flower takes seconds.
    errors.print("starting Flower ...")
    with _importing():
        from zerofl.flower.client_app import app as client_app
        from zerofl.flower.engines import ENGINES, EngineError, check_engine
        from zerofl.flower.server_app import RoundError, server_app

    try:
        for experiment in chosen:
            check_engine(options.engine, experiment)
    except EngineError as error:
        errors.print(f"zerofl: {error}")
        return 2
    check_room(out, [experiment for experiment in chosen if not is_finished(out / experiment.name)])
    signal.signal(signal.SIGTERM, _interrupt)
    # What a run computes is in its folder, so it goes on when the reader of its lines, a pager or `head`, has gone.
    console.on_lost = lambda error: errors.print(
        f"zerofl: the output can no longer be written ({error.strerror}); the run goes on, with its results in {out}/"
    )
    keep_sweep(out, file, sweep)
    failed = []
    for experiment in chosen:
        directory = out / experiment.name
        try:
            with locked(directory):
                check_run(directory, experiment, options.resume)  # again: another process may have been here
                if is_finished(directory):
                    console.print(f"{experiment.name}: finished before, in {directory}")
                    continue
                checkpoint = open_run(directory, experiment, partial(_note, console, experiment.name))
                earlier = read_lines(directory / ROUNDS)
                console.print_prose(opening(experiment, len(earlier)))
                with contextlib.ExitStack() as shown:
                    progress = shown.enter_context(RunProgress(console, experiment.name, experiment.rounds, earlier))
                    watchers: list[Callable[[dict[str, Any]], None]] = [progress]
                    if options.tensorboard:
                        watchers.append(shown.enter_context(RoundEvents(directory, len(earlier) + 1)))
                    app = server_app(experiment, directory, checkpoint, _each(watchers))
                    ENGINES[options.engine](app, client_app, experiment, progress.replied)
        except KeyboardInterrupt as stopped:
            errors.print(f"zerofl: interrupted; go on with: {_resume_command(options)}")
            return TERMINATED if isinstance(stopped, _Terminated) else INTERRUPTED
        except OSError as error:  # a full disk stops the other runs too
            raise ResultsError(
                f"run {experiment.name}: {directory}: {error}; rounds that are whole are safe there. {fix_of(error)}, "
                f"then go on with: {_resume_command(options)}"
            ) from error
        except Exception as error:
            if not isinstance(error, (RoundError, EngineError, ResultsError)):
                errors.print(traceback.format_exc())  # not foreseen: say where
            errors.print(f"zerofl: run {experiment.name}: {error}")
            failed.append(experiment)
    finished = [read_summary(out / e.name) for e in chosen if is_finished(out / e.name)]
    if finished:
        console.print_table(summary_table(finished))
        console.print(f"results in {out}/")
    if failed:
        names = ", ".join(experiment.name for experiment in failed)
        errors.print(f"zerofl: failed: {names}; try again with: {_resume_command(options)}")
    return 1 if failed else 0


def _each(watchers: Sequence[Callable[[dict[str, Any]], None]]) -> Callable[[dict[str, Any]], None]:
    def watch(record: dict[str, Any]) -> None:
        for watcher in watchers:
            watcher(record)

    return watch


def _note(console: "Output", name: str, line: str) -> None:
    console.print(f"{name}: {line}")


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which stops a run as Ctrl-C does."""


def _interrupt(signum: int, frame: object) -> None:
    raise _Terminated


def _resume_command(options: argparse.Namespace) -> str:
    words = ["zerofl", "run", options.experiments]
    for option, values in (("--only", options.only or []), ("--set", options.settings)):
        words += [word for value in values for word in (option, value)]
    words += ["--root", options.root] if options.root is not None else []
    words += ["--out", str(options.out)] if options.out else []
    words += ["--tensorboard"] if options.tensorboard else []
    words += ["--engine", options.engine] if options.engine != "in-process" else []
    return shlex.join([*words, "--resume"])
