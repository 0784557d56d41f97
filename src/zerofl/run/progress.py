"""How a run shows itself: what it will take, a live line on a terminal, plain lines elsewhere, the table at the end."""

import math
import time
from collections.abc import Iterable
from types import TracebackType

from rich.console import RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table as Grid
from rich.text import Text

from zerofl.data import load_dataset
from zerofl.experiment import Experiment
from zerofl.fl.records import MB, RoundRecord, Summary
from zerofl.fl.train import empty_model
from zerofl.run.console import BETWEEN, Output, Table

MOST_BAR, LEAST_BAR = 40, 10  # characters


def opening(experiment: Experiment, done: int) -> str:
    """What a run will take, in a line; `done` are the rounds that a resumed one has behind it."""
    e = experiment
    parameters = sum(p.numel() for p in empty_model(e, load_dataset(e.dataset, e.root)).parameters())
    uplink = [e.uplink, f"mask ratio {e.mask_ratio:g}" if e.uplink != "full" else "", e.uplink_values]
    downlink = "" if e.downlink_values == "float32" else f"; downlink {e.downlink_values}"
    return (
        f"{e.name}: {e.rounds} round{'s' * (e.rounds > 1)}{f' from round {done + 1} on' if done else ''}, "
        f"{e.clients_per_round} of {e.clients} clients a round; {e.model} with {parameters:,} parameters, "
        f"sparsity {100 * e.sparsity:g}%; uplink {', '.join(filter(None, uplink))}{downlink}"
    )


def duration(seconds: float) -> str:
    """A time for people, rounded up: `42 s`, `12 min`, `2 h 40 min`, `3 d 4 h`."""
    if (whole := math.ceil(seconds)) < 60:
        return f"{whole} s"
    if (minutes := math.ceil(seconds / 60)) < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = math.ceil(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"


class RunProgress:
    """Shows one run's rounds; call it with each round's record. Use as a context manager.

    `earlier` are the records of the rounds that a resumed run has done before.
    """

    def __init__(self, console: Output, name: str, rounds: int, earlier: list[RoundRecord]) -> None:
        self._console, self._name, self._rounds = console, name, rounds
        self._earlier, self._started = len(earlier), time.monotonic()
        self._round, self._ends = len(earlier), 0.0
        self._clients, self._accuracy, self._loss, self._uplink_bytes, self._downlink_bytes = "", "", "", 0, 0
        for record in earlier:
            self._note(record)
        self._live = Live(get_renderable=self._line, console=console) if console.is_live else None

    def __enter__(self) -> "RunProgress":
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def __call__(self, record: RoundRecord) -> None:
        """Show a round that is done."""
        self._note(record)
        self._clients = ""
        seconds_a_round = (time.monotonic() - self._started) / (self._round - self._earlier)
        self._ends = time.monotonic() + seconds_a_round * (self._rounds - self._round)
        for failure in record.failures:
            cause = f"round {self._round}  client {failure['client']} failed: {failure['cause']}"
            self._console.print(BETWEEN.join([self._name, cause]))
        if not self._live:
            parts = [self._name, f"round {self._round}/{self._rounds}", *self._figures(), self._left()]
            self._console.print(BETWEEN.join(filter(None, parts)))

    def replied(self, replies: int, clients: int) -> None:
        """Show how many of the clients of a round have replied; on a terminal only."""
        self._clients = f"client {replies}/{clients}"

    def _note(self, record: RoundRecord) -> None:
        self._round = record.round
        self._uplink_bytes += record.uplink_bytes
        self._downlink_bytes += record.downlink_bytes
        if record.test_accuracy is not None:
            self._accuracy = f"accuracy {record.test_accuracy:.1%}"
        self._loss = "" if record.train_loss is None else f"loss {record.train_loss:.3f}"

    def _figures(self) -> list[str]:
        up, down = (f"{of / MB:.1f} MB" for of in (self._uplink_bytes, self._downlink_bytes))
        return [self._accuracy, self._loss, f"uplink {up}", f"downlink {down}"]

    def _left(self) -> str:
        if self._earlier < self._round < self._rounds:
            return f"about {duration(max(0, self._ends - time.monotonic()))} left"
        return ""

    def _line(self) -> RenderableType:
        """The live line: the round in progress, as much as there is room for, and a bar of the rounds that are done.

        It has no name, which stands above it and may be long.
        """
        width = self._console.width - 1
        round = f"round {min(self._round + 1, self._rounds)}/{self._rounds}"
        parts = list(filter(None, [round, self._clients, self._left(), *self._figures()]))
        while len(parts) > 1 and len(BETWEEN.join(parts)) > width:
            parts.pop()
        text = BETWEEN.join(parts)
        bar = min(MOST_BAR, width - len(text) - len(BETWEEN))
        line = Grid.grid(padding=(0, len(BETWEEN), 0, 0))
        shown: list[RenderableType] = [Text(text, no_wrap=True)]
        if bar >= LEAST_BAR:
            shown.append(ProgressBar(total=self._rounds, completed=self._round, width=bar))
        line.add_row(*shown)
        return line


def summary_table(summaries: Iterable[Summary]) -> Table:
    """Final accuracy, savings, and the bytes both ways of finished runs."""
    columns = ["run", "test accuracy", "savings", "uplink MB", "downlink MB", "rounds", "s a round", "training s"]
    rows = [
        [
            summary.name,
            "" if summary.test_accuracy is None else f"{summary.test_accuracy:.1%}",
            f"{summary.savings:.1f}x",
            f"{summary.uplink_bytes / MB:.1f}",
            f"{summary.downlink_bytes / MB:.1f}",
            str(summary.rounds),
            f"{summary.seconds / summary.rounds:.2f}",
            f"{summary.train_seconds:.1f}",
        ]
        for summary in summaries
    ]
    return Table(columns, rows)
