"""How `zerofl data check` shows a data set: its classes, and which of them each client has."""

from collections.abc import Sequence

from rich import box
from rich.table import Table
from torch import Tensor

from zerofl.data.check import Report

CLIENTS_SHOWN = 20
ZERO = "·"


def classes_table(report: Report) -> Table:
    """The classes with their numbers of training and test samples, and the sums of these."""
    table = Table("class", box=box.SIMPLE_HEAD, show_footer=True)
    table.columns[0].footer = "all"
    for part, counts in (("training", report.train), ("test", report.test)):
        table.add_column(part, justify="right", footer=f"{sum(counts):,}")
    for name, train, test in zip(report.classes, report.train, report.test, strict=True):
        table.add_row(name, _cell(train), _cell(test))
    return table


def client_tables(clients: Sequence[str], counts: Tensor, classes: Sequence[str], width: int) -> list[Table]:
    """The samples of each class (columns) that each client (rows) has, from `counts`, int64 [clients, classes].

    The first `CLIENTS_SHOWN` clients, then the smallest, the median and the largest. There are as many tables as it
    takes to stay within `width` characters.
    """
    sizes = counts.sum(1)
    by_size = sizes.argsort(stable=True).tolist()
    extremes = {"smallest": by_size[0], "median": by_size[len(by_size) // 2], "largest": by_size[-1]}
    rows = [(clients[i], i) for i in range(min(CLIENTS_SHOWN, len(clients)))]
    rows_below = [(f"{size}: {clients[i]}", i) for size, i in extremes.items()]
    cells = [[_cell(n) for n in counts[i].tolist()] for _, i in rows + rows_below]
    # Between columns is a space, as is at the edges.
    widths = [max(len(name), *(len(row[c]) for row in cells)) + 1 for c, name in enumerate(classes)]
    labels = max(len(label) for label, _ in rows + rows_below) + len(" samples ")
    tables = []
    for first, last in _blocks(widths, width - labels - 2):
        table = Table("client", box=box.SIMPLE_HEAD, padding=0)
        for name in ("samples", *classes[first:last]):
            table.add_column(name, justify="right", no_wrap=True)
        for (label, i), row in zip(rows + rows_below, cells, strict=True):
            table.add_row(label, _cell(int(sizes[i])), *row[first:last], end_section=label == rows[-1][0])
        tables.append(table)
    return tables


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
