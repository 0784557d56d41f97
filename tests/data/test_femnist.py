import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from zerofl.data import DatasetError, client_indices, load_dataset
from zerofl.data.femnist import load_femnist

SAMPLES = {"writer_b": (3, 1), "writer_a": (2, 2), "writer_c": (1, 0)}
"""Each writer's training and test images."""


def pixels(writer: str, part: str, index: int) -> np.ndarray:
    """A writer's image uint8 [784], of random ink."""
    seed = [ord(writer[-1]), ord(part[1]), index]
    return np.random.default_rng(seed).integers(0, 256, 784).astype(np.uint8)


def leaf_file(writers: dict[str, int], part: str) -> dict[str, Any]:
    """LEAF's json: an image's label is its number in the writer's list, plus 10."""
    data = {
        writer: {
            "x": [(pixels(writer, part, i) / 255).tolist() for i in range(count)],
            "y": [10 + i for i in range(count)],
        }
        for writer, count in writers.items()
    }
    return {"users": list(writers), "num_samples": list(writers.values()), "user_data": data}


def write_femnist(root: Path) -> Path:
    """LEAF's folders with three writers, whose images are in two training files."""
    for part, column in (("train", 0), ("test", 1)):
        folder = root / "femnist" / part
        folder.mkdir(parents=True)
        counts = {writer: samples[column] for writer, samples in SAMPLES.items() if samples[column]}
        for number in (0, 1):
            chosen = {w: n for w, n in counts.items() if (w == "writer_a") == number}
            (folder / f"all_data_{number}.json").write_text(json.dumps(leaf_file(chosen, part)))
    return root


@pytest.fixture
def femnist_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ZEROFL_CACHE", str(tmp_path / "cache"))
    return write_femnist(tmp_path / "data")


def test_writers_and_their_images_to_the_byte(femnist_root: Path) -> None:
    for _ in range(2):  # the second time from the cache
        dataset = load_femnist(str(femnist_root))
        assert list(dataset.clients) == ["writer_a", "writer_b", "writer_c"]
        for writer, indices in dataset.clients.items():
            count = SAMPLES[writer][0]
            images = np.stack([pixels(writer, "train", i) for i in range(count)]).reshape(-1, 1, 28, 28)
            torch.testing.assert_close(dataset.train.images[indices], torch.from_numpy(images))
            assert dataset.train.labels[indices].tolist() == [10 + i for i in range(count)]
        assert (len(dataset.train.labels), len(dataset.test.labels), len(dataset.classes)) == (6, 3, 62)
        assert dataset.classes[10] == "A"


def test_ink_is_one_and_paper_zero(femnist_root: Path) -> None:
    dataset = load_femnist(str(femnist_root))
    paper_and_ink = torch.tensor([255, 0], dtype=torch.uint8).view(1, 1, 1, 2)
    torch.testing.assert_close(dataset.normalized(paper_and_ink).flatten(), torch.tensor([0.0, 1.0]))


def test_a_changed_file_is_read_anew(femnist_root: Path) -> None:
    before = load_femnist(str(femnist_root))
    document = leaf_file({"writer_a": 1}, "train")
    (femnist_root / "femnist" / "train" / "all_data_1.json").write_text(json.dumps(document))
    after = load_femnist(str(femnist_root))
    assert len(before.train.labels) == 6
    assert len(after.train.labels) == 5


@pytest.mark.parametrize("left", [0, 7, 500, -1])
def test_a_damaged_cache_is_made_anew(femnist_root: Path, left: int) -> None:
    before = load_femnist(str(femnist_root))
    (file,) = (femnist_root.parent / "cache").iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:left])
    after = load_femnist(str(femnist_root))
    assert torch.equal(after.train.images, before.train.images)
    assert file.read_bytes() == whole


def test_a_cache_that_cannot_be_written_warns_and_goes_on(femnist_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = femnist_root / "file"
    blocked.touch()
    monkeypatch.setenv("ZEROFL_CACHE", str(blocked / "cache"))
    with pytest.warns(UserWarning, match="cannot be written, the next start reads the data anew"):
        assert len(load_femnist(str(femnist_root)).train.labels) == 6


def test_each_writer_is_a_client(femnist_root: Path) -> None:
    parts = client_indices("femnist", str(femnist_root), "natural", 3, 1.0, 1)
    assert [len(part) for part in parts] == [2, 3, 1]
    with pytest.raises(ValueError, match="clients = 5: with partition = 'natural' this data set has 3"):
        client_indices("femnist", str(femnist_root), "natural", 5, 1.0, 1)


def test_a_data_set_without_clients_of_its_own_has_no_natural_partition(cifar_root: Path) -> None:
    load_dataset("cifar10", str(cifar_root))
    with pytest.raises(ValueError, match="has no clients of its own; use partition = 'lda'"):
        client_indices("cifar10", str(cifar_root), "natural", 5, 1.0, 1)


def changed(**values: Any) -> dict[str, Any]:
    document = leaf_file({"writer_a": 2}, "train")
    document["user_data"]["writer_a"] |= values
    return document


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("{", "is not LEAF's json, or is truncated"),
        ({"users": ["x"]}, "is not LEAF's json, or is truncated: KeyError"),
        ({"users": ["x"], "user_data": {}}, "is not LEAF's json, or is truncated: KeyError"),
        (changed(x=[[0.5] * 783] * 2), "writer writer_a: expected images of 784 numbers"),
        (changed(x=[[0.5] * 784]), r"writer writer_a: 1 images and labels of shape \(2,\), expected as many"),
        (changed(x=[[1.5] * 784] * 2), r"writer writer_a: expected pixels from 0 \(ink\) to 1 \(paper\)"),
        (changed(x=[[float("nan")] * 784] * 2), r"writer writer_a: expected pixels from 0 \(ink\) to 1 \(paper\)"),
        (changed(y=[0, 62]), r"writer writer_a: expected whole labels from 0 to 61, found \[ 0 62\]"),
        (changed(y=[0.5, 1.5]), "writer writer_a: expected whole labels from 0 to 61"),
        (leaf_file({"writer_a": 2}, "train") | {"num_samples": [3]}, "writer_a: has 2 images, but num_samples = 3"),
        (leaf_file({"writer_a": 2}, "train") | {"num_samples": 2}, "expected num_samples for each of its 1 users"),
        (leaf_file({"writer_b": 1}, "train"), "writer writer_b is in .* and in another file"),
    ],
)  # fmt: skip
def test_a_malformed_file_is_named(femnist_root: Path, document: Any, message: str) -> None:
    file = femnist_root / "femnist" / "train" / "all_data_1.json"
    file.write_text(document if isinstance(document, str) else json.dumps(document))
    with pytest.raises(DatasetError, match=message) as raised:
        load_femnist(str(femnist_root))
    assert "all_data_1.json" in str(raised.value)


def test_a_wrong_folder_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"found no train/\*.json in .* or its folders femnist, data\. Make them"):
        load_femnist(str(tmp_path))
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
    (tmp_path / "train" / "a.json").write_text("{}")
    with pytest.raises(DatasetError, match=r"has train/\*\.json, but its test/ holds no \*\.json"):
        load_femnist(str(tmp_path))


def test_a_writers_own_folder_needs_no_test_part(femnist_root: Path) -> None:
    whole = load_femnist(str(femnist_root))
    shutil.rmtree(femnist_root / "femnist" / "test")
    own = load_femnist(str(femnist_root))
    assert torch.equal(own.train.images, whole.train.images)
    assert own.clients.keys() == whole.clients.keys()
    assert (own.test.images.shape, own.test.images.dtype) == ((0, 1, 28, 28), torch.uint8)
    assert own.test.labels.shape == (0,)
