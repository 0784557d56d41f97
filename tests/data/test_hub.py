"""Data sets read from the hub's parquet files."""

import contextlib
import io
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.conftest import write_cifar_python
from tests.data import hub_data
from tests.data.test_speech import SPEAKERS, write_wav
from zerofl.data import Dataset, DatasetError
from zerofl.data.cifar10 import load_cifar10
from zerofl.data.dataset import checksum
from zerofl.data.femnist import load_femnist
from zerofl.data.image import decode_image
from zerofl.data.speech import load_speech_commands, load_speech_commands_by_speaker
from zerofl.rng import rng


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZEROFL_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `zerofl data fetch` makes it, and the same speech in folders of words; not to be changed."""
    root = tmp_path_factory.mktemp("hub")
    write_wav(root / "folders" / "_background_noise_" / "hum.wav", 20_000)
    write_wav(root / "folders" / "_background_noise_" / "rain.wav", 30_000, seed=1)
    write_wav(root / "folders" / "_silence_" / "1.wav", 16_000)  # of the official test set; not read
    for number, speaker in enumerate(SPEAKERS):
        for word in ("yes", "bed"):
            write_wav(
                root / "folders" / word / f"{speaker}_nohash_{number % 3}.wav", 12_000 + 100 * number, seed=number
            )
    hub_data.save(
        {"train": hub_data.cifar_split(range(5)), "test": hub_data.cifar_split(range(5, 6))}, root / "cifar10"
    )
    hub_data.save({"train": hub_data.femnist_split()}, root / "femnist")
    hub_data.save(hub_data.speech_splits(root / "folders"), root / "speech_commands")
    return root


@pytest.fixture
def hub(saved: Path, tmp_path: Path) -> Path:
    """A copy of it, without the folders of words."""
    return Path(shutil.copytree(saved, tmp_path / "hub", ignore=shutil.ignore_patterns("folders")))


def test_cifar10_is_the_same_as_from_the_batches(hub: Path, cifar_root: Path) -> None:
    batches = checksum(load_cifar10(str(cifar_root)))
    assert checksum(load_cifar10(str(hub))) == batches
    assert checksum(load_cifar10(str(hub / "cifar10"))) == batches


@pytest.mark.parametrize("folder", ["plain_text", "data"])
def test_the_hubs_own_names_of_files(folder: str, cifar_root: Path, tmp_path: Path) -> None:
    inner = tmp_path / "download" / folder
    hub_data.save(
        {
            "train-00000-of-00002": hub_data.cifar_split(range(3)),
            "train-00001-of-00002": hub_data.cifar_split(range(3, 5)),
            "test-00000-of-00001": hub_data.cifar_split(range(5, 6)),
        },
        inner,
    )
    assert checksum(load_cifar10(str(inner.parent))) == checksum(load_cifar10(str(cifar_root)))


def test_batches_come_before_parquet_files(hub: Path) -> None:
    write_cifar_python(hub / "cifar-10-batches-py", per_batch=10)
    assert len(load_cifar10(str(hub)).train.labels) == 50


def test_labels_go_by_the_names_in_the_file(hub: Path) -> None:
    """The same classes in another order in the file: labels are ours. Without names the file's numbers are."""
    before = load_cifar10(str(hub)).train.labels
    train = hub / "cifar10" / "train.parquet"
    for old, new in (("cat", "other"), ("dog", "cat"), ("other", "dog")):
        hub_data.rename(train, old, new)
    swapped = before.clone()
    swapped[before == 3], swapped[before == 5] = 5, 3
    assert torch.equal(load_cifar10(str(hub)).train.labels, swapped)
    hub_data.without_metadata(train)
    assert torch.equal(load_cifar10(str(hub)).train.labels, before)


def test_a_fifth_of_each_writers_images_is_the_test_part(hub: Path) -> None:
    for root in (hub, hub / "femnist", hub):  # the last time from the cache
        dataset = load_femnist(str(root))
        writers = sorted(hub_data.WRITERS)
        assert list(dataset.clients) == writers
        tests = []
        for number, writer in enumerate(writers):
            count = hub_data.WRITERS[writer]
            in_test = sorted(rng(0, 0, number, "femnist test").permutation(count)[: count // 5].tolist())
            in_train = [i for i in range(count) if i not in in_test]
            tests += [(writer, i) for i in in_test]
            indices = dataset.clients[writer]
            assert dataset.train.labels[indices].tolist() == in_train
            expected = np.stack([hub_data.ink(writer, i) for i in in_train])[:, None]
            np.testing.assert_array_equal(dataset.train.images[indices].numpy(), expected)
        assert dataset.test.labels.tolist() == [i for _, i in tests]
        np.testing.assert_array_equal(
            dataset.test.images[:, 0].numpy(), np.stack([hub_data.ink(*test) for test in tests])
        )
        assert len(tests) == sum(count // 5 for count in hub_data.WRITERS.values()) == 5


def test_writers_with_few_images_only_make_no_test_part(tmp_path: Path) -> None:
    rows = hub_data.femnist_split().filter(lambda row: row["character"] < 4)
    hub_data.save({"train": rows}, tmp_path / "femnist")
    with pytest.raises(DatasetError, match="has 4 writers, expected at least one with 5 or more images"):
        load_femnist(str(tmp_path))


@pytest.mark.parametrize("load", [load_speech_commands, load_speech_commands_by_speaker])
def test_speech_is_the_same_as_from_folders_of_words(load: Callable[[str], Dataset], saved: Path, hub: Path) -> None:
    folders = load(str(saved / "folders"))
    assert "_silence_" not in folders.clients
    for _ in range(2):  # the second time from the cache
        assert checksum(load(str(hub))) == checksum(folders)


def test_both_splits_of_speech_have_a_cache_of_their_own(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_speech_commands(str(hub))
    after_the_other = load_speech_commands_by_speaker(str(hub))
    monkeypatch.setenv("ZEROFL_CACHE", str(hub / "empty"))
    assert checksum(after_the_other) == checksum(load_speech_commands_by_speaker(str(hub)))


def cut(column: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda row: row | {column: row[column] | {"bytes": row[column]["bytes"][:-300]}}


def png(width: int, height: int) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height)).save(buffer, "png")
    return {"bytes": buffer.getvalue(), "path": None}


DAMAGED = [
    ("cifar10/test", cut("img"), "is not an image, or is truncated"),
    ("cifar10/test", lambda row: row | {"img": png(28, 32)}, "is 28x32, expected 32x32"),
    ("cifar10/test", lambda row: row | {"img": {"bytes": None, "path": "a.png"}}, "has no bytes in img, expected a"),
    ("cifar10/test", lambda row: row | {"img": None}, "has no bytes in img"),
    ("cifar10/test", lambda row: row | {"label": 10}, "has label = 10, expected 0 to 9"),
    ("cifar10/test", lambda row: row | {"label": None}, "has label = None, expected 0 to 9"),
    ("femnist/train", cut("image"), "is not an image, or is truncated"),
    ("femnist/train", lambda row: row | {"image": png(32, 32)}, "is 32x32, expected 28x28"),
    ("femnist/train", lambda row: row | {"character": -1}, "has character = -1, expected 0 to 61"),
    ("speech_commands/train", cut("audio"), "is not a sound file, or is truncated: it has [0-9]+ bytes of sound"),
    ("speech_commands/train", lambda row: row | {"audio": {"bytes": b"RIFF", "path": "a.wav"}}, "is not a sound file"),
    ("speech_commands/train", lambda row: row | {"audio": None}, "has no bytes in audio"),
    ("speech_commands/train", lambda row: row | {"label": 99}, "has label = 99, expected 0 to 2"),
]  # fmt: skip
LOADERS = {"cifar10": load_cifar10, "femnist": load_femnist, "speech_commands": load_speech_commands_by_speaker}


@pytest.mark.parametrize(("split", "edit", "message"), DAMAGED)
def test_a_damaged_row_is_named(
    split: str, edit: Callable[[dict[str, Any]], dict[str, Any]], message: str, hub: Path
) -> None:
    file = hub / f"{split}.parquet"
    hub_data.change(file, 7, edit)
    name = split.split("/")[0]
    with pytest.raises(DatasetError, match=f"^{name}: .*{split}.parquet, row 7 {message}"):
        LOADERS[name](str(hub))


@pytest.mark.parametrize(
    ("split", "column"), [("cifar10/train", "img"), ("femnist/train", "writer_id"), ("speech_commands/test", "audio")]
)
def test_a_damaged_file_and_a_missing_column_are_named(split: str, column: str, hub: Path) -> None:
    name, file = split.split("/")[0], hub / f"{split}.parquet"
    whole = file.read_bytes()
    hub_data.rename(file, column, "something")
    with pytest.raises(
        DatasetError, match=f"^{name}: .*{split}.parquet lacks the columns {column}; it has .*something"
    ):
        LOADERS[name](str(hub))
    for data in (whole[: len(whole) // 2], b"", whole[:100] + bytes(len(whole) // 2) + whole[100 + len(whole) // 2 :]):
        file.write_bytes(data)
        with pytest.raises(DatasetError, match=rf"^{name}: .*{split}.parquet"):
            LOADERS[name](str(hub))


def test_classes_of_other_data_and_missing_names_are_said(hub: Path) -> None:
    hub_data.rename(hub / "cifar10" / "train.parquet", "frog", "toad")
    with pytest.raises(DatasetError, match=r"train.parquet, row 6 is of the class 'toad', expected airplane, auto"):
        load_cifar10(str(hub))
    hub_data.without_metadata(hub / "speech_commands" / "train.parquet")
    with pytest.raises(DatasetError, match=r"row 0 has label = [0-9], expected text, as the file's metadata does not"):
        load_speech_commands(str(hub))


def test_a_missing_part_and_missing_noises_are_said(hub: Path) -> None:
    (hub / "cifar10" / "test.parquet").unlink()
    with pytest.raises(DatasetError, match=r"has parquet files, but no images in test\*.parquet"):
        load_cifar10(str(hub))
    (hub / "speech_commands" / "train.parquet").unlink()
    with pytest.raises(
        DatasetError, match=r"has no background noises, rows with the label _silence_, in validation.pa"
    ):
        load_speech_commands(str(hub))


def test_what_is_not_installed_is_said(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(DatasetError, match=r"row 0 needs Pillow to be read: pip install 'pillow>="):
        load_cifar10(str(hub))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DatasetError, match=r"train.parquet needs pyarrow to be read: pip install 'flwr-datasets"):
        load_cifar10(str(hub))


IMAGE = io.BytesIO()
Image.fromarray(np.arange(28 * 28, dtype=np.uint8).reshape(28, 28)).save(IMAGE, "png")


@pytest.mark.parametrize("place", [11, 36])  # the lengths of a PNG's header and of its pixels
def test_wrong_lengths_in_an_image_are_said(place: int) -> None:
    damaged = bytearray(IMAGE.getvalue())
    damaged[place] = 1
    with pytest.raises(DatasetError, match="^here is not an image, or is truncated"):
        decode_image(bytes(damaged), "L", 28, "here")


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(IMAGE.getvalue()) - 1), st.integers(0, 255)), max_size=4), st.data())
def test_a_damaged_image_is_an_image_or_an_error_of_ours(changes: list[tuple[int, int]], data: st.DataObject) -> None:
    damaged = bytearray(IMAGE.getvalue())
    for place, value in changes:
        damaged[place] = value
    length = data.draw(st.integers(0, len(damaged)) | st.just(len(damaged)))
    with contextlib.suppress(DatasetError):
        assert decode_image(bytes(damaged[:length]), "L", 28, "here").shape == (28, 28)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_an_image_of_more_than_8_bits_is_not_cut_off(dtype: type) -> None:
    encoded = io.BytesIO()
    Image.fromarray(np.full((28, 28), 300, dtype)).save(encoded, "tiff")
    with pytest.raises(DatasetError, match=r"^here has more than 8 bits a channel; save it with 8$"):
        decode_image(encoded.getvalue(), "L", 28, "here")
