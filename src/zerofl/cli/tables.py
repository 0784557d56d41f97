"""How `zerofl data check` shows a data set: its classes, and which of them each client has."""

from collections.abc import Sequence

from rich.cells import cell_len
from torch import Tensor

from zerofl.data.check import Report
from zerofl.run.console import BETWEEN, Table

CLIENTS_SHOWN = 20
ZERO = "."


def classes_table(report: Report) -> Table:
    """The classes with their numbers of training and test samples, and the sums of these."""
    counts = zip(report.classes, report.train, report.test, strict=True)
    rows = [[name, _cell(train), _cell(test)] for name, train, test in counts]
    return Table(["class", "training", "test"], [*rows, ["all", f"{sum(report.train):,}", f"{sum(report.test):,}"]])


def client_tables(clients: Sequence[str], counts: Tensor, classes: Sequence[str], width: int | None) -> list[Table]:
    """The samples of each class (columns) that each client (rows) has, from `counts`, int64 [clients, classes].

    The first `CLIENTS_SHOWN` clients, then the smallest, the median and the largest. There are as many tables as it
    takes to stay within `width` characters; None is one table.
    """
    sizes = counts.sum(1)
    by_size = sizes.argsort(stable=True).tolist()
    extremes = {"smallest": by_size[0], "median": by_size[len(by_size) // 2], "largest": by_size[-1]}
    labels = [(clients[i], i) for i in range(min(CLIENTS_SHOWN, len(clients)))]
    labels += [(f"{size}: {clients[i]}", i) for size, i in extremes.items()]
    rows = [[label, _cell(int(sizes[i])), *(_cell(n) for n in counts[i].tolist())] for label, i in labels]
    columns = ["client", "samples", *classes]
    widths = [max(map(cell_len, column)) + len(BETWEEN) for column in zip(columns, *rows, strict=True)]
    blocks = [(0, len(classes))] if width is None else _blocks(widths[2:], width - sum(widths[:2]) + len(BETWEEN))
    return [
        Table([*columns[:2], *classes[first:last]], [[*row[:2], *row[2 + first : 2 + last]] for row in rows])
        for first, last in blocks
    ]


def _blocks(widths: Sequence[int], most: int) -> list[tuple[int, int]]:
    """Ranges of columns that are `most` wide together, or of one column."""
    starts, used = [0], 0
    for column, width in enumerate(widths):
        if used and used + width > most:
            starts.append(column)
            used = 0
        used += width
    return list(zip(starts, [*starts[1:], len(widths)], strict=True))


def _cell(count: int) -> str:
    return f"{count:,}" if count else ZERO
