"""What the commands print: text as it is, and tables that fit. Printing does not fail."""

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple, TextIO, cast

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

BETWEEN = "  "
"""What separates two columns."""


class Table(NamedTuple):
    """A table to print, its columns in the order of their importance.

    The first `keys` columns say what a row is, and are never left out.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    keys: int = 1


class Output(Console):
    """The way to a terminal or pipe.

    Text is printed as it is: a path with brackets is no markup, and no line is broken but by the terminal. What the
    stream's encoding lacks is escaped. Once the stream cannot be written any more, its reader having gone, all further
    text is dropped, and `on_lost` is called once: what a command computes does not depend on who looks on.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.on_lost: Callable[[OSError], None] = lambda error: None
        super().__init__(
            file=cast(TextIO, _Stream(stream, lambda error: self.on_lost(error))),
            force_terminal=stream is not None and stream.isatty(),
            force_jupyter=False,
            markup=False,
            emoji=False,
            highlight=False,
            soft_wrap=True,
        )

    @property
    def is_live(self) -> bool:
        """If lines on it can be written over: it is a terminal that can move its cursor."""
        return self.is_terminal and not self.is_dumb_terminal

    def print_prose(self, text: str) -> None:
        """Print a sentence, on a terminal broken between words."""
        self.print(text, soft_wrap=not self.is_terminal)

    def print_table(self, table: Table) -> None:
        """Print a table with one line a row: whole, or on a terminal those columns that fit."""
        (heading, *rows), hidden = _lines(table, self.width if self.is_terminal else None)
        self.print(Text(heading, style="bold"))
        for row in rows:
            self.print(row)
        if hidden:
            self.print(f"({hidden} more column{'s' * (hidden > 1)}: widen the terminal, or pipe the output)")


def _lines(table: Table, width: int | None) -> tuple[list[str], int]:
    """The heading and the rows, within `width` if it is given, and the number of columns that are left out for it."""
    cells = [table.columns, *table.rows]
    widths = [max(cell_len(row[column]) for row in cells) for column in range(len(table.columns))]
    ends = [sum(widths[: column + 1]) + len(BETWEEN) * column for column in range(len(widths))]
    # A row without any figure says nothing: the first one stays, and the terminal breaks the line if it must.
    shown = sum(width is None or end <= width or column <= table.keys for column, end in enumerate(ends))
    lines = [
        BETWEEN.join(_padded(row[column], widths[column], column < table.keys) for column in range(shown)).rstrip()
        for row in cells
    ]
    return lines, len(widths) - shown


def _padded(cell: str, width: int, left: bool) -> str:
    spaces = " " * (width - cell_len(cell))
    return cell + spaces if left else spaces + cell


class _Stream:
    """A text stream that can write everything and does not raise."""

    def __init__(self, stream: TextIO | None, on_lost: Callable[[OSError], None]) -> None:
        self._stream, self._on_lost = stream, on_lost
        self.encoding = getattr(stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        writable = text.encode(self.encoding, "backslashreplace").decode(self.encoding)
        self._try(lambda stream: stream.write(writable))
        return len(text)

    def flush(self) -> None:
        self._try(lambda stream: stream.flush())

    def isatty(self) -> bool:
        return self._stream is not None and self._stream.isatty()

    def fileno(self) -> int:
        if self._stream is None:
            raise OSError("no stream")
        return self._stream.fileno()

    def _try(self, action: Callable[[TextIO], object]) -> None:
        if self._stream is None:
            return
        try:
            action(self._stream)
        except OSError as error:
            stream, self._stream = self._stream, None
            # What is left in its buffer would fail once more when Python ends.
            with contextlib.suppress(OSError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)
            self._on_lost(error)
