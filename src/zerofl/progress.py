"""How a run shows itself: a live line on a terminal, plain lines elsewhere, and the table at the end."""

import math
import time
from collections.abc import Iterable
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

MB = 1e6


class RunProgress:
    """Shows one run's rounds; call it with each round's record. Use as a context manager.

    `earlier` are the records of the rounds that a resumed run has done before.
    """

    def __init__(self, console: Console, name: str, rounds: int, earlier: list[dict[str, Any]]) -> None:
        self._console, self._name, self._rounds = console, name, rounds
        self._earlier, self._started = len(earlier), time.monotonic()
        self._uplink_bytes = 0
        self._accuracy = "-"
        for record in earlier:
            self._note(record)
        self._progress: Progress | None = None
        if console.is_terminal:
            self._progress = Progress(TextColumn("{task.description}"), BarColumn(), console=console)
            self._task = self._progress.add_task(self._line(len(earlier), None), total=rounds, completed=len(earlier))

    def __enter__(self) -> "RunProgress":
        if self._progress:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._progress:
            self._progress.stop()

    def __call__(self, record: dict[str, Any]) -> None:
        """Show a round that is done."""
        self._note(record)
        round = record["round"]
        line = self._line(round, record["train_loss"])
        for failure in record["failures"]:
            cause = f"{self._name}  round {round}  client {failure['client']} failed: {failure['cause']}"
            self._console.print(cause, markup=False, highlight=False, soft_wrap=True)
        if self._progress:
            self._progress.update(self._task, description=line, completed=round)
        else:
            self._console.print(line, highlight=False, soft_wrap=True)

    def _note(self, record: dict[str, Any]) -> None:
        self._uplink_bytes += record["uplink_bytes"]
        if record.get("test_accuracy") is not None:
            self._accuracy = f"{record['test_accuracy']:.1%}"

    def _line(self, round: int, train_loss: float | None) -> str:
        parts = [f"{self._name}  round {round}/{self._rounds}", f"accuracy {self._accuracy}"]
        if train_loss is not None:
            parts.append(f"loss {train_loss:.3f}")
        parts.append(f"uplink {self._uplink_bytes / MB:.1f} MB")
        if round > self._earlier:
            seconds_a_round = (time.monotonic() - self._started) / (round - self._earlier)
            minutes, seconds = divmod(math.ceil(seconds_a_round * (self._rounds - round)), 60)
            parts.append(f"{minutes}:{seconds:02d} left")
        return "  ".join(parts)


def summary_table(summaries: Iterable[dict[str, Any]]) -> Table:
    """Final accuracy, uplink and savings of finished runs."""
    table = Table("run", "rounds", "test accuracy", "uplink MB", "savings", "training s", "s a round")
    table.columns[0].overflow = "fold"
    for column in table.columns[1:]:
        column.justify = "right"
    for summary in summaries:
        table.add_row(
            summary["name"],
            str(summary["rounds"]),
            f"{summary['test_accuracy']:.1%}",
            f"{summary['uplink_bytes'] / MB:.1f}",
            f"{summary['savings']:.1f}x",
            f"{summary['train_seconds']:.1f}",
            f"{summary['seconds'] / summary['rounds']:.2f}",
        )
    return table
