"""Stray, damaged and unreadable files in each form of each data set: the same data set, or an error that names them."""

import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.data.forms import FORMS, NOISE
from tests.data.test_femnist import write_femnist
from zerofl.data import Dataset, DatasetError
from zerofl.data.cifar10 import load_cifar10
from zerofl.data.dataset import checksum
from zerofl.data.femnist import load_femnist

MORE_THAN_ROOT_CANNOT_READ = "/proc/self/mem"


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZEROFL_CACHE", str(tmp_path / "cache"))


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


IMAGE = [[0.5] * 784]


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("[" * 100_000, "is not LEAF's json, or is truncated"),
        ("[]", "is not LEAF's json"),
        ('{"users": ["w"], "user_data": {"w": {"x": [], "y": 5}}}', r"writer w: 0 images and labels of shape \(\)"),
        ('{"users": ["w"], "user_data": {"w": {"x": [1e999], "y": []}}}', "writer w: expected images of 784 numbers"),
        ('{"users": ["w"], "user_data": {"w": {"x": [1' + "0" * 400 + '], "y": []}}}', "writer w: expected images"),
        ('{"users": ["w"], "user_data": {"w": {"x": [null], "y": []}}}', "writer w: expected images of 784 numbers"),
        (json.dumps({"users": ["w"], "user_data": {"w": {"x": IMAGE, "y": [10**30]}}}), "expected whole labels"),
        (json.dumps({"users": ["w"], "user_data": {"w": {"x": IMAGE, "y": [[1], [2, 3]]}}}), "writer w: expected"),
        (json.dumps({"users": ["a\nb"], "user_data": {"a\nb": {"x": IMAGE, "y": [1]}}}), r"a writer 'a\\nb'"),
        (json.dumps({"users": ["\ud800"], "user_data": {"\ud800": {"x": IMAGE, "y": [1]}}}), "expected a name of"),
        (json.dumps({"users": [""], "user_data": {"": {"x": IMAGE, "y": [1]}}}), "expected a name of"),
    ],
)  # fmt: skip
def test_malformed_json_is_named(document: str, message: str, tmp_path: Path) -> None:
    write_femnist(tmp_path)
    file = tmp_path / "femnist" / "train" / "all_data_1.json"
    file.write_text(document)
    with pytest.raises(DatasetError, match=rf"all_data_1\.json.*{message}"):
        load_femnist(str(tmp_path))
