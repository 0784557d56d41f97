"""Stray, damaged and unreadable files in each form of each data set: the same data set, or an error that names them."""

import gzip
import io
import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from tests import hub_data
from tests.conftest import cifar_batch, write_cifar_python
from tests.test_data import binary
from tests.test_femnist import write_femnist
from tests.test_speech import write_wav
from zerofl.data import Dataset, DatasetError
from zerofl.data.cifar10 import CLASSES, load_cifar10
from zerofl.data.dataset import checksum
from zerofl.data.femnist import load_femnist
from zerofl.data.speech import load_speech_commands_by_speaker


class Form(NamedTuple):
    """A form of a data set: what writes it, what loads it, one of its files, and a name like those of its files."""

    write: Callable[[Path], object]
    load: Callable[[str], Dataset]
    file: str
    alike: str


def write_cifar_binary(root: Path) -> None:
    for seed, name in enumerate([*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]):
        root.mkdir(exist_ok=True)
        (root / name).write_bytes(binary(*cifar_batch(seed, 10)))


def write_cifar_images(root: Path) -> None:
    for seed, part in enumerate(("train", "test")):
        for image, label in zip(*cifar_batch(seed, 10), strict=True):
            path = root / part / CLASSES[label] / "0.png"
            path.parent.mkdir(parents=True)
            Image.fromarray(image.reshape(3, 32, 32).transpose(1, 2, 0)).save(path)


def write_speech(root: Path) -> None:
    """Three speakers, of whom the last two are in the test part by the rule of `load_speech_commands_by_speaker`."""
    write_wav(root / "_background_noise_" / "hum.wav", 16_000)
    for number, speaker in enumerate(("00000000", "00000001", "00000006")):
        write_wav(root / "yes" / f"{speaker}_nohash_0.wav", 12_000, seed=number)


def write_speech_parquet(root: Path) -> None:
    write_speech(root.with_name("folders"))
    hub_data.save(hub_data.speech_splits(root.with_name("folders")), root)


def write_cifar_parquet(root: Path) -> None:
    hub_data.save({"train": hub_data.cifar_split(range(1), 10), "test": hub_data.cifar_split(range(1, 2), 10)}, root)


FORMS = {
    "cifar10 python": Form(lambda root: write_cifar_python(root, 10), load_cifar10, "data_batch_3", "data_batch_6"),
    "cifar10 binary": Form(write_cifar_binary, load_cifar10, "data_batch_3.bin", "data_batch_6.bin"),
    "cifar10 images": Form(write_cifar_images, load_cifar10, "train/cat/0.png", "1.png"),
    "cifar10 parquet": Form(write_cifar_parquet, load_cifar10, "train.parquet", "train-1.parquet"),
    "femnist json": Form(write_femnist, load_femnist, "femnist/train/all_data_1.json", "all_data_2.json"),
    "femnist parquet": Form(
        lambda root: hub_data.save({"train": hub_data.femnist_split()}, root),
        load_femnist,
        "train.parquet",
        "train-1.parquet",
    ),
    "speech wav": Form(
        write_speech, load_speech_commands_by_speaker, "yes/00000000_nohash_0.wav", "00000000_nohash_1.wav"
    ),
    "speech parquet": Form(
        write_speech_parquet, load_speech_commands_by_speaker, "train.parquet", "train-1.parquet"
    ),
}  # fmt: skip
MORE_THAN_ROOT_CANNOT_READ = "/proc/self/mem"


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZEROFL_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """Each form's folder, not to be changed, and its checksum."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZEROFL_CACHE", str(tmp_path_factory.mktemp("cache")))
        whole = {}
        for name, form in FORMS.items():
            root = tmp_path_factory.mktemp("form") / "data"
            form.write(root)
            whole[name] = root, checksum(form.load(str(root)))
        return whole


class Copy(NamedTuple):
    """A copy of a form's folder, which may be changed: its root, one of its files, a name like it beside it."""

    root: Path
    file: Path
    alike: Path
    load: Callable[[str], Dataset]
    whole: str

    def is_whole(self) -> bool:
        return checksum(self.load(str(self.root))) == self.whole


@pytest.fixture(params=FORMS)
def copy(request: pytest.FixtureRequest, saved: dict[str, tuple[Path, str]], tmp_path: Path) -> Copy:
    root, whole = saved[request.param]
    form = FORMS[request.param]
    copied = Path(shutil.copytree(root, tmp_path / "data"))
    file = copied / form.file
    return Copy(copied, file, file.with_name(form.alike), form.load, whole)


def zip_of(path: Path) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.write(path, path.name)
    return buffer.getvalue()


NOISE = np.random.default_rng(0).bytes(1000)
STRAYS: dict[str, Callable[[Copy], object]] = {
    "a shadow of macOS": lambda copy: copy.file.with_name(f"._{copy.file.name}").write_bytes(b"\0\5\x16\7" + NOISE),
    "a hidden copy": lambda copy: shutil.copy(copy.file, copy.file.with_name(f".{copy.alike.name}")),
    "a hidden folder": lambda copy: shutil.copytree(copy.file.parent, copy.file.with_name(".ipynb_checkpoints")),
    "an unpacked __MACOSX": lambda copy: shutil.copytree(copy.file.parent, copy.root / "__MACOSX"),
    "a file manager's": lambda copy: [copy.file.with_name(n).write_bytes(NOISE) for n in (".DS_Store", "Thumbs.db")],
    "an empty text": lambda copy: copy.file.with_name("notes.txt").touch(),
    "a zip": lambda copy: copy.file.with_name("old.zip").write_bytes(zip_of(copy.file)),
    "a damaged archive": lambda copy: copy.file.with_name("old.tar.gz").write_bytes(b"\x1f\x8b" + NOISE),
    "a link to nowhere": lambda copy: copy.file.with_name("notes.txt").symlink_to("nowhere"),
    "a name that is no text": lambda copy: copy.file.with_name(os.fsdecode(b"\xff.txt")).touch(),
}  # fmt: skip


@pytest.mark.parametrize("stray", STRAYS)
def test_what_is_no_sample_is_passed_over(stray: str, copy: Copy) -> None:
    STRAYS[stray](copy)
    assert copy.is_whole()


UNREADABLE: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "noise": lambda path: path.write_bytes(NOISE),
    "text with a mark of its bytes' order": lambda path: path.write_bytes(b"\xef\xbb\xbf[]"),
    "a folder": lambda path: path.mkdir(),
    "a link to nowhere": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "an error of the disk": lambda path: path.symlink_to(MORE_THAN_ROOT_CANNOT_READ),
    "forbidden": lambda path: path.touch(mode=0),
}


def make_unreadable(kind: str, path: Path) -> None:
    UNREADABLE[kind](path)
    if kind == "forbidden" and os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    if kind == "an error of the disk" and not path.exists():
        pytest.skip(f"there is no {MORE_THAN_ROOT_CANNOT_READ}")


@pytest.mark.parametrize("kind", UNREADABLE)
def test_a_file_too_many_is_passed_over_or_named(kind: str, copy: Copy) -> None:
    make_unreadable(kind, copy.alike)
    try:
        assert copy.is_whole()
    except DatasetError as error:
        assert copy.alike.name in str(error)  # noqa: PT017


@pytest.mark.parametrize("kind", [*UNREADABLE, "cut"])
def test_a_damaged_file_is_named(kind: str, copy: Copy) -> None:
    whole = copy.file.read_bytes()
    copy.file.unlink()
    if kind == "cut":
        copy.file.write_bytes(whole[: len(whole) // 2 + 1])
    else:
        make_unreadable(kind, copy.file)
    with pytest.raises(DatasetError, match=copy.file.name):
        copy.load(str(copy.root))


def test_a_folder_that_may_not_be_read_is_named(copy: Copy) -> None:
    copy.file.parent.chmod(0)
    try:
        if os.access(copy.file.parent, os.R_OK):
            pytest.skip("this user may read everything")
        with pytest.raises(DatasetError, match=f"{copy.file.parent.name}.* cannot be read"):
            copy.load(str(copy.root))
    finally:
        copy.file.parent.chmod(0o700)


@pytest.mark.parametrize("kind", ["zip", "tar", "gztar", "bztar", "xztar"])
def test_an_archive_is_read_or_named(kind: str, copy: Copy) -> None:
    archive = shutil.make_archive(str(copy.root.parent / "packed"), kind, copy.root)
    if copy.load is load_cifar10 and copy.file.suffix != ".parquet":
        assert checksum(copy.load(archive)) == copy.whole
    else:
        with pytest.raises(DatasetError, match=rf"{Path(archive).name} .*: unpack"):
            copy.load(archive)


def members(archive: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(archive) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


def patched(data: bytes, in_local: int, in_central: int, value: int) -> bytes:
    """A zip archive with a byte of each member's local and central header set to `value`."""
    changed = bytearray(data)
    for signature, offset in ((b"PK\3\4", in_local), (b"PK\1\2", in_central)):
        place = changed.find(signature)
        while place >= 0:
            changed[place + offset] = value
            place = changed.find(signature, place + 4)
    return bytes(changed)


@pytest.fixture
def zipped(saved: dict[str, tuple[Path, str]], tmp_path: Path) -> Path:
    """Class folders of images in an archive, not compressed."""
    archive = tmp_path / "packed.zip"
    root, _ = saved["cifar10 images"]
    with zipfile.ZipFile(archive, "w") as packed:
        for path in sorted(root.rglob("*")):
            packed.write(path, path.relative_to(root.parent))
    return archive


def test_a_zip_with_backslashes_is_read(zipped: Path, saved: dict[str, tuple[Path, str]]) -> None:
    files = members(zipped)
    with zipfile.ZipFile(zipped, "w") as packed:
        for name, data in files.items():
            packed.writestr(name.replace("/", "\\"), data)
    assert checksum(load_cifar10(str(zipped))) == saved["cifar10 images"][1]


@pytest.mark.parametrize(
    ("in_local", "in_central", "value", "message"),
    [
        (6, 8, 1, r"airplane/0\.png cannot be read: .* is encrypted, .*Unpack the archive, and give the folder"),
        (
            8,
            10,
            9,
            r"airplane/0\.png cannot be read: it is packed with Deflate64, .*Unpack the archive, and give the folder",
        ),
        (8, 10, 99, r"airplane/0\.png cannot be read: .*not supported.*Unpack the archive, and give the folder"),
        (8, 10, 8, r"airplane/0\.png cannot be read, it may be truncated"),  # stored, and called deflated
        (8, 10, 12, r"airplane/0\.png cannot be read, it may be truncated"),  # bzip2
        (8, 10, 14, r"airplane/0\.png cannot be read, it may be truncated"),  # LZMA
    ],
)
def test_a_zip_that_cannot_be_unpacked_says_why(
    zipped: Path, in_local: int, in_central: int, value: int, message: str
) -> None:
    """The bits of encryption and the methods of compression are by PKWARE's specification, 4.3.7, 4.3.12 and 4.4.5."""
    zipped.write_bytes(patched(zipped.read_bytes(), in_local, in_central, value))
    with pytest.raises(DatasetError, match=rf"packed\.zip.*{message}"):
        load_cifar10(str(zipped))


@pytest.mark.parametrize("form", ["cifar10 binary", "cifar10 images"])
@pytest.mark.parametrize("kind", ["zip", "tar", "gztar", "bztar", "xztar"])
def test_a_damaged_archive_is_whole_or_named(
    kind: str, form: str, saved: dict[str, tuple[Path, str]], tmp_path: Path
) -> None:
    """Cut at every tenth of its length, or with other bytes there: of a tar's own pixels nobody can tell."""
    root, whole = saved[form]
    expected = (50, 10) if form == "cifar10 binary" else (10, 10)
    archive = Path(shutil.make_archive(str(tmp_path / "packed"), kind, root))
    data = archive.read_bytes()
    ends = len(data) - len(data.rstrip(b"\0"))
    for place in [*range(0, len(data), len(data) // 10), len(data) - ends, len(data) - ends // 512 * 512]:
        for damaged in (data[:place], data[:place] + NOISE + data[place + len(NOISE) :]):
            archive.write_bytes(damaged)
            try:
                dataset = load_cifar10(str(archive))
                samples = len(dataset.train.labels), len(dataset.test.labels)
                assert checksum(dataset) == whole or (kind == "tar" and damaged[place:] and samples == expected)
            except DatasetError as error:
                assert archive.name in str(error)  # noqa: PT017


def test_a_tar_that_ends_too_soon_or_lost_a_bit_is_named(saved: dict[str, tuple[Path, str]], tmp_path: Path) -> None:
    """What tarfile reads without an error: as a smaller data set, or with other pixels."""
    root, whole = saved["cifar10 images"]
    archive = Path(shutil.make_archive(str(tmp_path / "packed"), "tar", root))
    data = archive.read_bytes()
    with tarfile.open(archive) as tar:
        middle = tar.getmember("./test/dog/0.png")
    header, pixels = middle.offset, middle.offset_data + middle.size // 2
    flipped = data[:pixels] + bytes([data[pixels] ^ 1]) + data[pixels + 1 :]
    damaged = {
        "cut before a member": data[:header],
        "a damaged header": data[: header + 100] + b"x" * 8 + data[header + 108 :],
        "an empty header": data[:header] + bytes(512) + data[header + 512 :],
        "gzip's checksum": gzip.compress(flipped, 0)[:-8] + gzip.compress(data, 0)[-8:],
    }
    for content in damaged.values():
        archive.write_bytes(content)
        with pytest.raises(DatasetError, match=r"packed\.tar cannot be read, it may be truncated"):
            load_cifar10(str(archive))
    archive.write_bytes(gzip.compress(data, 0))
    assert checksum(load_cifar10(str(archive))) == whole
