"""Data sets in the form that the Hugging Face hub keeps them: local parquet files, a row a sample. Nothing downloads.

Images and sounds are in the rows as the bytes of their files. Rows count from 0 in messages.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from zerofl.data.dataset import DatasetError
from zerofl.data.files import visible
from zerofl.data.image import decode_image
from zerofl.errors import install_hint

SPLITS = ("train", "validation", "test")
FOLDERS = ("", "data", "plain_text", "v0.01")
"""Where the hub's repositories have their files."""
ROWS_AT_ONCE = 1024


def parquet_files(source: Path, folders: Sequence[str]) -> dict[str, list[Path]]:
    """The files `train*.parquet`, `validation*.parquet` and `test*.parquet`, by split, of the first folder with any.

    Looked for in `folders` below `source`, and in each of these in `FOLDERS`; {} if there are none.

    Raises:
        OSError: a folder may not be read.
    """
    for folder in (source / name / inner for name in folders for inner in FOLDERS):
        tables = [path for path in visible(folder) if path.suffix == ".parquet"]
        files = {split: [path for path in tables if path.name.startswith(split)] for split in SPLITS}
        if any(files.values()):
            return {split: paths for split, paths in files.items() if paths}
    return {}


def read_rows(path: Path, columns: Sequence[str], prefix: str) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Each row of a parquet file: where it is, for messages, which begin with `prefix`, and its values in `columns`.

    Raises:
        DatasetError: pyarrow is not installed, or the file is damaged or lacks a column.
    """
    with _opened(path, columns, prefix) as file:
        row = 0
        for batch in file.iter_batches(ROWS_AT_ONCE, columns=list(columns)):
            for values in zip(*(batch.column(name).to_pylist() for name in columns), strict=True):
                yield f"{prefix}{path}, row {row}", values
                row += 1


def read_column(path: Path, column: str, prefix: str) -> Any:
    """A column of a parquet file as pyarrow's ChunkedArray.

    Raises:
        DatasetError: as `read_rows`.
    """
    with _opened(path, [column], prefix) as file:
        return file.read([column]).column(column)


def class_names(path: Path, column: str, prefix: str, default: Sequence[str] = ()) -> list[str]:
    """The names that stand for the numbers in a column, which are in the file's metadata; without them `default`.

    Raises:
        DatasetError: as `read_rows`.
    """
    with _opened(path, [column], prefix) as file:
        metadata = (file.schema_arrow.metadata or {}).get(b"huggingface", b"{}")
    try:
        names = json.loads(metadata).get("info", {}).get("features", {}).get(column, {}).get("names")
        return list(names or default)
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise DatasetError(f"{prefix}{path} has metadata that are not the hub's, or are damaged: {error!r}") from error


def class_name(value: Any, names: Sequence[str], column: str, where: str) -> str:
    """The name of a row's class: of a number the one in `names`; text is the name itself.

    Raises:
        DatasetError: it is neither text nor one of the numbers; it starts with `where`.
    """
    if isinstance(value, str):
        return value
    if not isinstance(value, int) or not 0 <= value < len(names):
        expected = f"0 to {len(names) - 1}" if names else "text, as the file's metadata does not name its classes"
        raise DatasetError(f"{where} has {column} = {value!r}, expected {expected}")
    return names[value]


def file_bytes(value: Any, column: str, where: str) -> bytes:
    """The file, an image or a sound, in a row.

    Raises:
        DatasetError: there is none; it starts with `where`.
    """
    data = value.get("bytes") if isinstance(value, dict) else None
    if not isinstance(data, bytes) or not data:
        raise DatasetError(f"{where} has no bytes in {column}, expected a whole file, not its path alone")
    return data


def read_images(
    path: Path, image: str, label: str, others: Sequence[str], mode: str, size: int, classes: Sequence[str], prefix: str
) -> Iterator[tuple[np.ndarray, int, tuple[Any, ...]]]:
    """Each row's image as by `decode_image`, its label as an index into `classes`, and its values in `others`.

    Raises:
        DatasetError: a file or a row is not what it should be; it names file and row.
    """
    names = class_names(path, label, prefix, classes)
    labels = {name: index for index, name in enumerate(classes)}
    for where, (value, number, *rest) in read_rows(path, [image, label, *others], prefix):
        name = class_name(number, names, label, where)
        if name not in labels:
            raise DatasetError(f"{where} is of the class {name!r}, expected {', '.join(classes)}")
        yield decode_image(file_bytes(value, image, where), mode, size, where), labels[name], tuple(rest)


@contextmanager
def _opened(path: Path, columns: Sequence[str], prefix: str) -> Iterator[Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DatasetError(f"{prefix}{path} needs pyarrow to be read: {install_hint('hub')}") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            missing = [name for name in columns if name not in file.schema_arrow.names]
            if missing:
                found = ", ".join(file.schema_arrow.names)
                raise DatasetError(f"{prefix}{path} lacks the columns {', '.join(missing)}; it has {found}")
            yield file
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{prefix}{path} is not a parquet file, or is damaged: {error}") from error
