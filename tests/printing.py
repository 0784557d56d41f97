"""A terminal to print on in a test."""

import io
import re


class Terminal(io.StringIO):
    """Text that passes for a terminal; its width is $COLUMNS."""

    def isatty(self) -> bool:
        return True


def lines_of(terminal: Terminal) -> list[str]:
    """The lines that were printed, without what moves the cursor or colours."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue()).replace("\r", "\n").splitlines()
