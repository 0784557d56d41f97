"""Damaged archives are whole or named."""

import gzip
import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.data.forms import NOISE
from zerofl.data import DatasetError
from zerofl.data.cifar10 import load_cifar10
from zerofl.data.dataset import checksum


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZEROFL_CACHE", str(tmp_path / "cache"))


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
