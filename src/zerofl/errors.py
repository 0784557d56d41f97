"""What to install for the optional parts of the package."""

import re
from importlib.metadata import requires

DISTRIBUTION = "zerofl-torch"
"""The name under which this package is installed. On the package index `zerofl` is somebody else's."""


def install_hint(extra: str) -> str:
    """The command that installs what an extra of this package needs, by the names of those packages.

    It does not name this package: there is no release of it on an index yet.
    """
    of_extra = re.compile(rf"""extra == ['"]{re.escape(extra)}['"]""")
    needed = [line.partition(";")[0].strip() for line in requires(DISTRIBUTION) or [] if of_extra.search(line)]
    return "pip install " + " ".join(f"'{package}'" for package in needed)
