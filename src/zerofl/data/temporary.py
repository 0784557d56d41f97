"""Where a file is written before it takes its place: a folder of the process's own, so that no two meet in one name."""

import glob
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """An empty folder next to `path` (so on one disk with it) for this process to write in, which is gone at the end.

    Those that killed processes of this machine left beside `path` go too; one of a living process stays. A process
    writes one thing at a time beside a path.

    Raises:
        OSError: it cannot be made.
    """
    beginning = f"{path.name}.{platform.node()}-"
    for left in path.parent.glob(f"{glob.escape(beginning)}*.tmp"):
        process = left.name.removeprefix(beginning).removesuffix(".tmp")
        if process.isdecimal() and not _lives(int(process)):
            shutil.rmtree(left, ignore_errors=True)  # another process may be at it as well
    folder = path.with_name(f"{beginning}{os.getpid()}.tmp")
    shutil.rmtree(folder, ignore_errors=True)  # of a process before that had this number
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # somebody else's
    return True
