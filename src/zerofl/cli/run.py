"""`zerofl run`: the experiments of a file or preset, one after another."""

import argparse
import importlib.util
import shlex
import signal
import sys
import traceback
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zerofl.cli.importing import INTERRUPTED, TERMINATED, importing

if TYPE_CHECKING:
    from zerofl.experiment import Experiment
    from zerofl.run.console import Output
    from zerofl.run.sweep import Sweep


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
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
    run.add_argument("--root", metavar="DIR", help="where the data set is; the same as --set root=DIR")
    run.add_argument("--out", metavar="DIR", type=Path, help="where results go (default: runs/<file name>)")
    run.add_argument("--resume", action="store_true", help="resume what is in the results folder")
    run.add_argument(
        "--engine",
        choices=("in-process", "ray"),
        default="in-process",
        help="what carries the messages (default: %(default)s)",
    )
    run.add_argument("--tensorboard", action="store_true", help="also write TensorBoard events into each run's folder")
    run.set_defaults(command=_run)


def _run(options: argparse.Namespace, console: "Output", errors: "Output") -> int:
    from zerofl.data import load_dataset
    from zerofl.errors import install_hint
    from zerofl.run.files import ResultsError
    from zerofl.run.folder import is_finished, read_summary
    from zerofl.run.preflight import preflight
    from zerofl.run.progress import summary_table
    from zerofl.run.sweep import find_sweep, keep_sweep, read_sweep

    if options.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ResultsError(f"--tensorboard needs TensorBoard: {install_hint('tensorboard')}")
    file = find_sweep(options.experiments)
    sweep = read_sweep(file, _settings(options), options.only or ())
    chosen = _chosen(sweep, options.only)
    out: Path = options.out or Path("runs") / file.stem
    # Before anything is computed: is every data set there and fit for its run, and every folder free or resumable?
    for dataset, root in dict.fromkeys((experiment.dataset, experiment.root) for experiment in chosen):
        errors.print(f"reading {dataset} ...")
        load_dataset(dataset, root)
    chosen = preflight(out, chosen, options.resume, partial(_check_engine, options.engine, errors))
    came: list[int] = []

    def interrupt(number: int, frame: object) -> None:
        came.append(number)  # not in the exception: Ray's core, where a run may wait, raises one of its own instead
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    # What a run computes is in its folder, so it continues when the reader of its lines, a pager or `head`, has gone.
    console.on_lost = lambda error: errors.print(
        f"zerofl: the output can no longer be written ({error.strerror}); the run continues, with its results in {out}/"
    )
    keep_sweep(out, file, sweep)
    left = [experiment for experiment in chosen if not is_finished(out / experiment.name)]
    if len(left) > 1:  # each says for itself what it will take
        rounds = sum(experiment.rounds for experiment in left)
        console.print(f"{len(left)} runs, one after another, with {rounds:,} rounds in all")
    try:
        failed = [experiment.name for experiment in chosen if not _runs(out, experiment, options, console, errors)]
    except KeyboardInterrupt:
        errors.print(f"zerofl: interrupted; resume with: {_resume_command(options)}")
        return TERMINATED if came else INTERRUPTED
    finished = [read_summary(out / e.name) for e in chosen if is_finished(out / e.name)]
    if finished:
        console.print_table(summary_table(finished))
        console.print(f"results in {out}/")
    if failed:
        errors.print(f"zerofl: failed: {', '.join(failed)}; try again with: {_resume_command(options)}")
    return 1 if failed else 0


def _check_engine(engine: str, errors: "Output", experiment: "Experiment") -> None:
    if "flwr" not in sys.modules:
        errors.print("starting Flower ...")  # only now, because it takes seconds
    with importing():
        from zerofl.flower.engines import check_engine

    check_engine(engine, experiment)


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """The values that override those of the file."""
    from zerofl.experiment import parse_setting

    settings = dict(parse_setting(setting) for setting in options.settings)
    return settings if options.root is None else settings | {"root": options.root}


def _chosen(sweep: "Sweep", only: list[str] | None) -> "list[Experiment]":
    """The experiments of the rows or runs that --only names, each once; all without it."""
    from zerofl.experiment import ExperimentError

    experiments = sweep.experiments()
    if not only:
        return list(experiments.values())
    named = {row.name: row.experiments for row in sweep.rows} | {name: [e] for name, e in experiments.items()}
    for name in only:
        if name not in named:
            raise ExperimentError(f"--only {name}: no such run; the runs are {', '.join(experiments)}")
    return list(dict.fromkeys(experiment for name in only for experiment in named[name]))


def _runs(
    out: Path, experiment: "Experiment", options: argparse.Namespace, console: "Output", errors: "Output"
) -> bool:
    """Run an experiment; returns False if it failed, which is said, so that the next one can be run."""
    from zerofl.errors import ZeroFLError
    from zerofl.flower.engines import ENGINES, rounds_on
    from zerofl.run.files import ResultsError
    from zerofl.run.one import run_one
    from zerofl.run.room import fix_of

    directory, rounds = out / experiment.name, rounds_on(ENGINES[options.engine])
    try:
        run_one(directory, experiment, options.resume, rounds, console, options.tensorboard)
    except OSError as error:  # a full disk stops the other runs too
        raise ResultsError(
            f"run {experiment.name}: {directory}: {error}; rounds that are whole are safe there. {fix_of(error)}, "
            f"then resume with: {_resume_command(options)}"
        ) from error
    except Exception as error:
        if not isinstance(error, ZeroFLError):
            errors.print(traceback.format_exc())  # not foreseen: say where
        errors.print(f"zerofl: run {experiment.name}: {error}")
        return False
    return True


def _resume_command(options: argparse.Namespace) -> str:
    """The command as it was given, and --resume."""
    return shlex.join(["zerofl", *options.given, *([] if options.resume else ["--resume"])])
