"""What a report is made of: the runs of a folder, by the rows of the file they are of."""

import re
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

from zerofl.exchange.update import State
from zerofl.experiment import Experiment
from zerofl.fl.records import RoundRecord, Summary
from zerofl.report.checks import check_layers, check_snapshots
from zerofl.run.checkpoint import read_snapshots
from zerofl.run.files import EXPERIMENT, ROUNDS, SNAPSHOTS, SUMMARY, SWEEP, ResultsError, damaged
from zerofl.run.folder import is_finished, read_experiment, read_rounds, read_summary
from zerofl.run.sweep import Sweep, read_sweep

NO_ROUND = "no round yet"


class Run(NamedTuple):
    """One run: its settings, its rounds, and its summary once it is finished."""

    directory: Path
    experiment: Experiment
    rounds: list[RoundRecord]
    summary: Summary | None

    def snapshots(self) -> dict[int, State]:
        """The weights that were kept, by round; none of a run without sparse layers."""
        snapshots = {round: state for round, state in read_snapshots(self.directory).items() if state}
        check_snapshots(snapshots, str(self.directory / SNAPSHOTS))
        return snapshots

    def progress(self) -> str:
        """How far it has come: `round 12 of 60`."""
        return f"round {self.rounds[-1].round} of {self.experiment.rounds}"

    def curve(self, key: str) -> tuple[list[int], list[float]]:
        """A figure over the rounds that have it."""
        points = [(record.round, value) for record in self.rounds if (value := getattr(record, key)) is not None]
        return [round for round, _ in points], [value for _, value in points]

    def traffic(self) -> dict[int, int]:
        """The bytes up and down until each round's end; without refused ones, as in the table of both ways."""
        sums, total = {}, 0
        for record in self.rounds:
            total += record.uplink_bytes + record.downlink_bytes
            sums[record.round] = total
        return sums


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
    """A row of the file: its experiments by name, one for each seed, the runs there are of them, the paper's figures.

    A run is there once it has come through a round.
    """

    name: str
    experiments: dict[str, Experiment]
    runs: list[Run]
    paper: dict[str, float]

    @property
    def experiment(self) -> Experiment:
        """The settings, of the first seed that was run."""
        return self.runs[0].experiment if self.runs else next(iter(self.experiments.values()))

    @property
    def summaries(self) -> list[Summary]:
        """Those of the runs that have ended."""
        return [run.summary for run in self.runs if run.summary]

    def seeds(self) -> str:
        """How many of the seeds are finished: `1 of 3`."""
        return f"{len(self.summaries)} of {len(self.experiments)}"

    def unfinished(self) -> str:
        """How far the others have come: `seed 2: round 12 of 60, seed 3: no round yet`; empty if all are finished."""
        runs = {run.directory.resolve().name: run for run in self.runs}
        if not runs:
            return NO_ROUND
        open_ = {name: e for name, e in self.experiments.items() if name not in runs or not runs[name].summary}
        texts = {e.seed: runs[name].progress() if name in runs else NO_ROUND for name, e in open_.items()}
        if len(self.experiments) == 1:
            return "".join(texts.values())
        return ", ".join(f"seed {seed}: {text}" for seed, text in texts.items())

    def furthest(self) -> str:
        """How far the run has come that has come furthest, for a row without a finished one."""
        return max(self.runs, key=lambda run: len(run.rounds)).progress() if self.runs else NO_ROUND

    def measured(self, key: str) -> Measured | None:
        """A figure of the summaries of those runs that are finished."""
        values = [value for summary in self.summaries if (value := getattr(summary, key)) is not None]
        if not values:
            return None
        return Measured(mean(values), stdev(values) if len(values) > 1 else None, len(values))


class Collection(NamedTuple):
    """The rows of one folder; `about` is what the file says of itself."""

    name: str
    about: str
    metric: str
    rows: list[ReportRow]

    @property
    def started(self) -> list[ReportRow]:
        """The rows with a run that has come through a round."""
        return [row for row in self.rows if row.runs]


def collect(directory: Path) -> Collection:
    """A run's folder, or one with the folders of a sweep's runs.

    Rows stand in the order of the sweep's file, those that were not run among them; a run's folder is a row by itself.

    Raises:
        ResultsError: there is no run in it that has come through a round, or a file of one is damaged.
        ExperimentError: the sweep's file is malformed.
    """
    alone = (directory / EXPERIMENT).exists()
    inside = {path.parent for file in (EXPERIMENT, ROUNDS, SUMMARY) for path in directory.glob(f"*/{file}")}
    folders = [directory] if alone else sorted(inside)
    runs = {folder.resolve().name: _read_run(folder) for folder in folders}
    runs = {name: run for name, run in runs.items() if run.rounds}
    if not runs:
        raise ResultsError(
            f"{directory} holds no run with a finished round: expected a run's folder or one that holds some, "
            "for example runs/demo"
        )
    file = (directory.resolve().parent if alone else directory) / SWEEP
    sweep = read_sweep(file) if file.exists() else Sweep([])
    papers = {row.name: row.paper for row in sweep.rows}
    experiments = {} if alone else {row.name: {e.name: e for e in row.experiments} for row in sweep.rows}
    for name, run in runs.items():
        row = name if name in papers else re.sub(r"-seed\d+$", "", name)
        experiments.setdefault(row, {})[name] = run.experiment
    rows = [
        ReportRow(row, of, [runs[name] for name in of if name in runs], papers.get(row, {}))
        for row, of in experiments.items()
    ]
    about = _opening_comment(file) if file.exists() else ""
    return Collection(directory.resolve().name, about, sweep.metric, rows)


def _read_run(folder: Path) -> Run:
    if not (folder / EXPERIMENT).exists():
        raise ResultsError(f"{folder} has no {EXPERIMENT}, the run's settings: restore it, or move the folder away")
    rounds = read_rounds(folder)
    check_layers(rounds, str(folder / ROUNDS))
    summary = read_summary(folder) if is_finished(folder) else None
    if summary and summary.rounds != len(rounds):
        raise damaged(str(folder / SUMMARY), f"{len(rounds)} rounds, as the folder has", f"it has {summary.rounds}")
    return Run(folder, read_experiment(folder), rounds, summary)


def _opening_comment(file: Path) -> str:
    """The first paragraph of a file's comment: what it reproduces."""
    lines = []
    for line in file.read_text(encoding="utf-8-sig").splitlines():
        if not line.startswith("#") or not line.strip("# "):
            break
        lines.append(line.lstrip("# "))
    return " ".join(lines)
