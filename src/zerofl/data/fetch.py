"""Downloads a data set from the Hugging Face hub through flwr-datasets: only here, and only when asked to."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zerofl.data import DATASETS
from zerofl.data.dataset import DatasetError
from zerofl.data.source import Hub
from zerofl.data.temporary import folder_beside
from zerofl.errors import install_hint

CONVERTED = "refs/convert/parquet"
"""Where the hub keeps the parquet files that it made of a data set that comes as a script."""


def fetch(name: str, root: str, report: Callable[[str], None]) -> list[Path]:
    """Download a data set that the hub has into `root/name/<split>.parquet`; all of its files appear, or none.

    The rows stay in the hub's order, and the bytes of images and sounds as they are. `report` is given a line a step.

    Raises:
        DatasetError: flwr-datasets is not installed, the files are there already, or the download failed.
    """
    source, folder = DATASETS[name].hub, Path(root).expanduser() / name
    if source is None:
        raise DatasetError(f"{name}: it is not on the hub")
    there = sorted(folder.glob("*.parquet"))
    if there:
        names = ", ".join(path.name for path in there)
        raise DatasetError(f"{name}: {folder} holds {names} already; remove it, or give another folder with --root")
    # Read by flwr-datasets when it is imported: nothing is sent to anybody but the hub unless the user asks for it.
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    try:
        import flwr_datasets  # noqa: F401
    except ImportError as error:
        raise DatasetError(
            f"{name}: fetching it needs flwr-datasets, which is not installed: {install_hint('hub')}"
        ) from error
    report(f"{name}: fetching {source.repository} from the Hugging Face hub")
    try:
        try:
            splits = _download(source, {})
        except RuntimeError as error:
            if "scripts are no longer supported" not in str(error):
                raise
            splits = _download(source, {"revision": CONVERTED})
    except Exception as error:  # the hub's client raises errors of many libraries
        raise DatasetError(
            f"{name}: {source.repository} could not be fetched from the Hugging Face hub: "
            f"{type(error).__name__}: {error}. Without the network, give a local copy of the data set with --root; "
            "docs/experiments.md names its forms"
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    with folder_beside(folder / "parquet") as own:
        for split, rows in splits.items():
            rows.to_parquet(own / f"{split}.parquet")
        for split, rows in splits.items():
            path = (own / f"{split}.parquet").replace(folder / f"{split}.parquet")
            report(f"{name}: {path}, {len(rows)} rows, {path.stat().st_size / 1e6:.1f} MB")
    return [folder / f"{split}.parquet" for split in splits]


def _download(source: Hub, options: dict[str, Any]) -> dict[str, Any]:
    """The splits as `datasets.Dataset`, with sounds as the bytes of their files."""
    from datasets import Audio
    from flwr_datasets import FederatedDataset

    federated = FederatedDataset(
        dataset=source.repository, subset=source.subset, partitioners={}, shuffle=False, **options
    )
    splits = {}
    for split in source.splits:
        rows = federated.load_split(split)
        for column in source.sounds:
            rows = rows.cast_column(column, Audio(decode=False))
        splits[split] = rows
    return splits
