"""A file of experiments: its rows, each run with several seeds, and the paper's figures beside them."""

import re
import sys
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from zerofl.experiment import Experiment, ExperimentError, make_experiment
from zerofl.run.files import EXPERIMENT, SWEEP, ResultsError, write_atomically

METRICS = {
    "test_accuracy": "final test accuracy",
    "best_test_accuracy": "highest test accuracy",
    "validation_accuracy": "final validation accuracy",
}
"""What the paper's accuracy may be compared with: a figure of the summary, and what it is in words."""
PAPER_FIGURES = ("accuracy", "deviation", "size", "savings")


class Row(NamedTuple):
    """A `[[run]]` of the file: its experiments, one for each seed, and what the paper has in its place.

    `paper` may have `accuracy` and `deviation` in percent, the `size` of an update in the paper's MB, and `savings`.
    """

    name: str
    experiments: list[Experiment]
    paper: dict[str, float]


class Sweep(NamedTuple):
    """All rows of a file, and which figure of a run the paper reports: one of METRICS."""

    rows: list[Row]
    metric: str = "test_accuracy"

    def experiments(self) -> dict[str, Experiment]:
        """All experiments by their names, in the file's order."""
        return {experiment.name: experiment for row in self.rows for experiment in row.experiments}


def read_sweep(path: Path, settings: Mapping[str, Any] | None = None, only: Collection[str] = ()) -> Sweep:
    """The rows of a TOML file.

    A file has a table `[base]` with the values all runs share, and a table `[[run]]` with a `name` for each row, which
    may have a table `paper`. With `seeds`, a list, each row is run once with each, as NAME-seed1 and so on. `metric` is
    one of METRICS. The `settings` override the values of all runs, or of the rows and runs that `only` names.

    Raises:
        ExperimentError: the file is malformed; it says where.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        hint = "; TOML writes true and false, and texts in quotes" if "Invalid value" in str(error) else ""
        raise ExperimentError(f"{path}: not valid TOML: {error}{hint}") from error
    base, runs, seeds = document.pop("base", {}), document.pop("run", []), document.pop("seeds", None)
    metric = document.pop("metric", "test_accuracy")
    if isinstance(runs, dict):
        raise ExperimentError(f"{path}: [run] is one table, expected a list of them: write [[run]], also for one run")
    if isinstance(base, list):
        raise ExperimentError(f"{path}: [[base]] is a list of tables, expected one: write [base]")
    if document or not isinstance(base, dict) or not isinstance(runs, list):
        raise ExperimentError(
            f"{path}: expected [base], [[run]], seeds and metric only, found {', '.join(document) or 'other types'}"
        )
    if not isinstance(metric, str) or metric not in METRICS:
        raise ExperimentError(f"{path}: metric = {metric!r}: expected one of {', '.join(METRICS)}")
    if seeds is not None and not (isinstance(seeds, list) and seeds and all(type(s) is int for s in seeds)):
        raise ExperimentError(f"{path}: seeds = {seeds!r}: expected a list of whole numbers, for example [1, 2, 3]")
    if seeds is not None and len(set(seeds)) < len(seeds):
        raise ExperimentError(f"{path}: seeds = {seeds!r}: each seed may stand once")
    if not all(isinstance(run, dict) for run in runs):
        raise ExperimentError(f"{path}: expected tables [[run]], found run = {runs}")
    if not runs:
        raise ExperimentError(f'{path}: has no run; add [[run]] with name = "..."')
    settings = settings or {}
    if "name" in settings and (seeds is not None or len(runs) > 1):
        raise ExperimentError(
            f"name = {settings['name']!r}: {path} has several runs, each in a folder of its name; choose one with "
            "--only, and where the folders go with --out"
        )
    if "seed" in settings and seeds is not None:
        seeds = [settings["seed"]]
    rows: list[Row] = []
    for number, run in enumerate(runs, start=1):
        where = f"{path}, [[run]] {run.get('name', f'number {number}')}"
        if "name" not in run:
            raise ExperimentError(f'{where}: has no name; add name = "..."')
        if not isinstance(run["name"], str):
            raise ExperimentError(f"{where}: name = {run['name']!r}: expected a text")
        names = {run["name"], *(f"{run['name']}-seed{seed}" for seed in seeds or [])}
        values = {**base, **run, **(settings if not only or names & set(only) else {})}
        paper = values.pop("paper", {})
        if not isinstance(paper, dict) or not all(
            key in PAPER_FIGURES and type(value) in (int, float) and abs(value) <= sys.float_info.max
            for key, value in paper.items()
        ):
            raise ExperimentError(f"{where}: paper = {paper!r}: expected numbers for {', '.join(PAPER_FIGURES)} only")
        try:
            experiments = [
                make_experiment(values | ({} if seed is None else {"seed": seed, "name": f"{run['name']}-seed{seed}"}))
                for seed in (seeds or [None])
            ]
        except ExperimentError as error:
            raise ExperimentError(f"{where}: {error}") from error
        if any(row.name == run["name"] for row in rows):
            raise ExperimentError(f"{where}: the name stands twice; each run has its own folder")
        rows.append(Row(run["name"], experiments, {key: float(value) for key, value in paper.items()}))
    return Sweep(rows, metric)


def keep_sweep(out: Path, file: Path, sweep: Sweep) -> None:
    """Put the file that `sweep` was read from into the folder of its runs, for the report: rows and paper's figures.

    Raises:
        ResultsError: the folder has runs of another file, whose rows would no longer be known.
    """
    kept, content = out / SWEEP, file.read_bytes()
    if kept.exists():
        if kept.read_bytes() == content:
            return
        ours = {row.name for row in sweep.rows}
        lost = [name for name in _rows_with_runs(out) if name not in ours]
        if lost:
            raise ResultsError(
                f"{out} holds runs of another file: {', '.join(lost)} of its {SWEEP}, which {file} does not have. "
                "Write elsewhere with --out (a report takes several folders), or move the folders of those runs away"
            )
    write_atomically(kept, content)


def _rows_with_runs(out: Path) -> list[str]:
    """The rows of the folder's own file of which a run was started; none of a file that cannot be read any more."""
    try:
        rows = read_sweep(out / SWEEP).rows
    except ExperimentError:
        return []
    runs = {path.parent.name for path in out.glob(f"*/{EXPERIMENT}")}
    runs |= {re.sub(r"-seed\d+$", "", name) for name in runs}  # with seeds that the file no longer has, or never had
    return [row.name for row in rows if row.name in runs]


def find_sweep(file_or_preset: str) -> Path:
    """The file itself, or the preset of that name that comes with the package."""
    if Path(file_or_preset).is_file():
        return Path(file_or_preset)
    presets = Path(__file__).parents[1] / "experiments"
    preset = presets / f"{file_or_preset}.toml"
    if preset.is_file():
        return preset
    known = sorted(path.stem for path in presets.glob("*.toml"))
    raise ExperimentError(f"{file_or_preset}: neither a file nor a preset; the presets are {', '.join(known)}")
