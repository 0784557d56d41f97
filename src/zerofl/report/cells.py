"""What a report's tables are made of, and the same tables as Markdown and as CSV."""

import csv
import io
from collections.abc import Iterable
from typing import NamedTuple


class Beside(NamedTuple):
    """A measured figure and the paper's in the same cell; either may be empty."""

    measured: str
    paper: str


Cell = str | Beside


class Table(NamedTuple):
    """A heading, the columns' names, the rows of cells, and a word about them."""

    heading: str
    columns: list[str]
    rows: list[list[Cell]]
    note: str = ""


def lines_of(cell: Cell) -> list[str]:
    """The lines of a cell, the paper's figure in brackets on one of its own."""
    if isinstance(cell, str):
        return cell.split("\n")
    measured = cell.measured.split("\n") if cell.measured else []
    return measured + ([f"({cell.paper})"] if cell.paper else [])


def markdown(table: Table) -> str:
    """A table as Markdown; the lines of a cell are parted by <br>."""
    rows = [["<br>".join(map(escaped, lines_of(cell))) for cell in row] for row in table.rows]
    lines = [[escaped(column) for column in table.columns], ["---"] * len(table.columns), *rows]
    body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"### {escaped(table.heading)}\n\n{body}\n" + (f"\n{escaped(table.note)}\n" if table.note else "")


def escaped(text: str) -> str:
    """A text in Markdown that is no tag, no column and no new line there."""
    return " ".join(text.splitlines()).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def as_csv(named: Iterable[tuple[str, Table]]) -> str:
    """Tables with the names of their folders, as CSV: those of one heading are one table, under one header.

    Between two tables is an empty line. A measured figure and the paper's have a column each.
    """
    by_heading: dict[str, list[dict[str, str]]] = {}
    for name, table in named:
        beside = [any(isinstance(row[i], Beside) for row in table.rows) for i in range(len(table.columns))]
        for row in table.rows:
            record = {"folder": name, "table": table.heading}
            for column, cell, two in zip(table.columns, row, beside, strict=True):
                record |= _two_columns(column, cell) if two else {column: " ".join(lines_of(cell))}
            by_heading.setdefault(table.heading, []).append(record)
    return "\n".join(map(_csv_table, by_heading.values()))


def _two_columns(column: str, cell: Cell) -> dict[str, str]:
    measured, paper = cell if isinstance(cell, Beside) else (cell, "")
    return {column: " ".join(measured.split("\n")), f"{column}, paper": paper}


def _csv_table(records: list[dict[str, str]]) -> str:
    text = io.StringIO()
    columns = list(dict.fromkeys(column for record in records for column in record))
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()
