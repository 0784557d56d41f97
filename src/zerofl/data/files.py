"""Which files of a local folder count, and an error that names the one that cannot be read."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from zerofl.data.dataset import DatasetError


def visible(folder: Path) -> list[Path]:
    """What is in a folder, by name, without the hidden files that file managers leave; [] if it is no folder.

    macOS puts a hidden `._a.png` beside a file `a.png`.

    Raises:
        OSError: it may not be read. `Path.glob` would find nothing there, without a word.
    """
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".")) if folder.is_dir() else []


@contextmanager
def reading(name: str, source: Path) -> Iterator[None]:
    """Make the system's errors on the files of the data set `name` a DatasetError.

    It names the file, or where the system does not, as when reading an open one, `source`.
    """
    try:
        yield
    except OSError as error:
        where = error.filename if error.filename is not None else source
        raise DatasetError(f"{name}: {where} cannot be read: {error.strerror or error}") from error


def read_file(name: str, path: Path) -> bytes:
    """The bytes of a file of the data set `name`.

    Raises:
        DatasetError: it is a folder, or cannot be read.
    """
    with reading(name, path):
        return path.read_bytes()
