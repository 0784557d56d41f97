"""`zerofl data fetch`, with a hub that is in memory."""

import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
from datasets import Dataset

from tests.data import hub_data
from tests.data.test_speech import SPEAKERS, write_wav
from zerofl.cli import main
from zerofl.data import DATASETS, DatasetError
from zerofl.data.cifar10 import load_cifar10
from zerofl.data.dataset import checksum
from zerofl.data.femnist import load_femnist
from zerofl.data.fetch import fetch
from zerofl.data.speech import load_speech_commands_by_speaker


class FakeHub:
    """Stands in for `flwr_datasets.FederatedDataset`; `made` are the arguments it was made with."""

    splits: ClassVar[dict[str, Dataset]] = {}
    made: ClassVar[list[dict[str, Any]]] = []
    errors: ClassVar[list[Exception]] = []

    def __init__(self, **arguments: Any) -> None:
        self.made.append(arguments)

    def load_split(self, split: str) -> Dataset:
        if self.errors:
            raise self.errors.pop(0)
        return self.splits[split]


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[FakeHub]:
    monkeypatch.setenv("ZEROFL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("flwr_datasets.FederatedDataset", FakeHub)
    FakeHub.splits, FakeHub.made, FakeHub.errors = {}, [], []
    return FakeHub


def test_cifar10_comes_in_the_hubs_order_and_is_never_overwritten(
    hub: type[FakeHub], cifar_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.splits = {"train": hub_data.cifar_split(range(5)), "test": hub_data.cifar_split(range(5, 6))}
    root = str(tmp_path / "data")
    assert main(["data", "fetch", "cifar10", "--root", root]) == 0
    assert hub.made == [{"dataset": "uoft-cs/cifar10", "subset": None, "partitioners": {}, "shuffle": False}]
    captured = capsys.readouterr()
    assert "fetching uoft-cs/cifar10" in captured.err
    assert "train.parquet, 200 rows, " in captured.err
    assert f"zerofl data check cifar10 --root {root}" in captured.out.replace("\n", "")
    assert sorted(path.name for path in (tmp_path / "data" / "cifar10").iterdir()) == ["test.parquet", "train.parquet"]
    assert checksum(load_cifar10(root)) == checksum(load_cifar10(str(cifar_root)))
    assert main(["data", "fetch", "cifar10", "--root", root]) == 2
    message = "cifar10 holds test.parquet, train.parquet already; remove it, or give another folder with --root"
    assert message in capsys.readouterr().err
    assert len(hub.made) == 1


def test_femnist_and_speech_are_read_as_they_were_fetched(hub: type[FakeHub], tmp_path: Path) -> None:
    hub.splits = {"train": hub_data.femnist_split()}
    fetch("femnist", str(tmp_path), lambda _: None)
    assert sorted(load_femnist(str(tmp_path)).clients) == sorted(hub_data.WRITERS)
    write_wav(tmp_path / "folders" / "_background_noise_" / "hum.wav", 20_000)
    for number, speaker in enumerate(SPEAKERS):
        write_wav(tmp_path / "folders" / "yes" / f"{speaker}_nohash_0.wav", 12_000, seed=number)
    hub.splits = hub_data.speech_splits(tmp_path / "folders")
    fetch("speech_commands", str(tmp_path), lambda _: None)
    assert hub.made[-1]["subset"] == "v0.01"
    fetched, folders = (load_speech_commands_by_speaker(str(tmp_path / name)) for name in ("", "folders"))
    assert checksum(fetched) == checksum(folders)


def test_a_data_set_that_comes_as_a_script_is_taken_as_the_hub_converted_it(hub: type[FakeHub], tmp_path: Path) -> None:
    hub.splits = {"train": hub_data.femnist_split()}
    hub.errors = [RuntimeError("Dataset scripts are no longer supported, but found femnist.py")]
    fetch("femnist", str(tmp_path), lambda _: None)
    assert [arguments.get("revision") for arguments in hub.made] == [None, "refs/convert/parquet"]
    assert (tmp_path / "femnist" / "train.parquet").exists()


@pytest.mark.parametrize(
    "error", [ConnectionError("Couldn't reach it"), RuntimeError("no disk"), ValueError("no such split")]
)
def test_a_failed_download_says_what_and_why_and_leaves_nothing(
    error: Exception, hub: type[FakeHub], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.errors = [error]
    assert main(["data", "fetch", "speech_commands", "--root", str(tmp_path / "data")]) == 2
    printed = capsys.readouterr().err
    expected = f"google/speech_commands could not be fetched from the Hugging Face hub: {type(error).__name__}: {error}"
    assert expected in printed
    assert "give a local copy of the data set with --root" in printed
    assert not (tmp_path / "data").exists()


def test_a_write_that_fails_leaves_no_files(
    hub: type[FakeHub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.splits = {"train": hub_data.cifar_split(range(1)), "test": hub_data.cifar_split(range(1))}
    write = Dataset.to_parquet

    def full(self: Dataset, path: Path) -> None:
        if path.name == "test.parquet":
            raise OSError("no space left")
        write(self, path)

    monkeypatch.setattr(Dataset, "to_parquet", full)
    with pytest.raises(OSError, match="no space left"):
        fetch("cifar10", str(tmp_path), lambda _: None)
    assert list((tmp_path / "cifar10").iterdir()) == []


def test_without_flwr_datasets_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flwr_datasets", None)
    for name in (name for name, source in DATASETS.items() if source.hub):
        with pytest.raises(DatasetError, match=rf"^{name}: .*pip install 'flwr-datasets"):
            fetch(name, str(tmp_path), lambda _: None)
    assert list(tmp_path.iterdir()) == []
