"""What goes wrong: the base of the package's own errors, and what to install where something is missing."""

import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, requires

DISTRIBUTION = "zerofl-torch"
"""The name under which this package is installed. On the package index `zerofl` is somebody else's."""


class ZeroFLError(Exception):
    """Something that cannot be done as it was asked for; the message says what, what was expected, and the fix."""


def some(items: Sequence[object], most: int = 3) -> str:
    """The first `most` of them in words, and how many more there are."""
    return ", ".join(map(str, items[:most])) + (f" and {len(items) - most} more" if len(items) > most else "")


def install_hint(extra: str) -> str:
    """The command that installs what an extra of this package needs, by the names of those packages.

    It does not name this package: there is no release of it on an index yet. Where the package is not installed, but
    run from its sources, it is their folder that is named.
    """
    of_extra = re.compile(rf"""extra == ['"]{re.escape(extra)}['"]""")
    try:
        lines = requires(DISTRIBUTION) or []
    except PackageNotFoundError:
        return f"pip install '.[{extra}]' in the folder of the sources"
    needed = [line.partition(";")[0].strip() for line in lines if of_extra.search(line)]
    return "pip install " + " ".join(f"'{package}'" for package in needed)
