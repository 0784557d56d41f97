"""What a report is made of: the runs of a folder, by the rows of the file they are of."""

import re
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from zerofl.experiment import Experiment
from zerofl.results import (
    EXPERIMENT,
    ROUNDS,
    SWEEP,
    ResultsError,
    is_finished,
    read_experiment,
    read_lines,
    read_snapshots,
    read_summary,
)  # fmt: skip
from zerofl.sweep import METRICS, read_sweep
from zerofl.uplink import State


class Run(NamedTuple):
    """One run: its settings, its rounds, and its summary once it is finished."""

    directory: Path
    experiment: Experiment
    rounds: list[dict[str, Any]]
    summary: dict[str, Any]

    def snapshots(self) -> dict[int, State]:
        """The weights that were kept, by round."""
        return read_snapshots(self.directory)

    def curve(self, key: str) -> tuple[list[int], list[float]]:
        """A figure over the rounds that have it."""
        points = [(record["round"], record[key]) for record in self.rounds if record.get(key) is not None]
        return [round for round, _ in points], [value for _, value in points]


class Measured(NamedTuple):
    """The mean over the seeds, and the sample deviation where there are several."""

    mean: float
    deviation: float | None
    seeds: int

    def text(self, digits: int = 2, factor: float = 1.0) -> str:
        """For a table: `74.00 ± 0.74`."""
        text = f"{self.mean * factor:.{digits}f}"
        return text if self.deviation is None else f"{text} ± {self.deviation * factor:.{digits}f}"


class ReportRow(NamedTuple):
    """A row of the file: its runs, one for each seed, and the paper's figures."""

    name: str
    runs: list[Run]
    paper: dict[str, float]

    @property
    def experiment(self) -> Experiment:
        """The settings, of the first seed."""
        return self.runs[0].experiment

    def measured(self, key: str) -> Measured | None:
        """A figure of the summaries of those runs that are finished."""
        values = [run.summary[key] for run in self.runs if run.summary.get(key) is not None]
        if not values:
            return None
        return Measured(mean(values), stdev(values) if len(values) > 1 else None, len(values))


class Collection(NamedTuple):
    """The rows of one folder; `about` is what the file says of itself."""

    name: str
    about: str
    metric: str
    rows: list[ReportRow]


def collect(directory: Path) -> Collection:
    """A run's folder, or one with the folders of a sweep's runs.

    Runs stand in the order of the sweep's file; those that have not come through a round are left out.

    Raises:
        ResultsError: there is no run in it that has come through a round.
    """
    if (directory / EXPERIMENT).exists():
        folders = [directory]
    else:
        folders = sorted(path.parent for path in directory.glob(f"*/{EXPERIMENT}"))
    runs = {folder.name: _read_run(folder) for folder in folders if (folder / ROUNDS).exists()}
    runs = {name: run for name, run in runs.items() if run.rounds}
    if not runs:
        raise ResultsError(
            f"{directory} holds no run with a finished round: expected a run's folder or one that holds some, "
            "for example runs/demo"
        )
    file = (directory if folders != [directory] else directory.parent) / SWEEP
    about, metric, papers, order = "", METRICS[0], {}, []
    if file.exists():
        sweep = read_sweep(file)
        metric, order = sweep.metric, [row.name for row in sweep.rows]
        papers = {row.name: row.paper for row in sweep.rows}
        about = _opening_comment(file)
    by_row: dict[str, list[Run]] = {}
    for name, run in runs.items():
        by_row.setdefault(name if name in order else re.sub(r"-seed\d+$", "", name), []).append(run)
    names = sorted(by_row, key=lambda name: (order.index(name) if name in order else len(order), name))
    rows = [ReportRow(name, by_row[name], papers.get(name, {})) for name in names]
    return Collection(directory.resolve().name, about, metric, rows)


def _read_run(folder: Path) -> Run:
    summary = read_summary(folder) if is_finished(folder) else {}
    return Run(folder, read_experiment(folder), read_lines(folder / ROUNDS), summary)


def _opening_comment(file: Path) -> str:
    """The first paragraph of a file's comment: what it reproduces."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#") or not line.strip("# "):
            break
        lines.append(line.lstrip("# "))
    return " ".join(lines)
