"""Stray, damaged and unreadable files in each form of each data set: the same data set, or an error that names them."""

import contextlib
import dataclasses
import gzip
import io
import json
import os
import pickle
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet
import pytest
import torch
from flwr.app import Context, Message
from PIL import Image

from tests.conftest import cifar_batch, write_cifar_python
from tests.data import hub_data
from tests.data.test_data import binary
from tests.data.test_femnist import write_femnist
from tests.data.test_speech import write_wav
from tests.running import run
from zerofl.cli import main
from zerofl.data import Dataset, DatasetError, load_dataset
from zerofl.data.cifar10 import CLASSES, load_cifar10
from zerofl.data.dataset import checksum
from zerofl.data.femnist import load_femnist
from zerofl.data.partition import validation_split
from zerofl.data.speech import load_speech_commands_by_speaker
from zerofl.experiment import Experiment, ExperimentError
from zerofl.fl.server import RoundError
from zerofl.flower.client_app import app as client_app
from zerofl.run.folder import read_lines
from zerofl.run.preflight import check_fits


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


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_json_may_begin_with_the_mark_of_its_bytes_order(encoding: str, tmp_path: Path) -> None:
    before = checksum(load_femnist(str(write_femnist(tmp_path))))
    for file in tmp_path.rglob("*.json"):
        file.write_text(file.read_text(), encoding=encoding)
    assert checksum(load_femnist(str(tmp_path))) == before


def test_what_stands_in_a_parquet_file_is_named(tmp_path: Path) -> None:
    write_cifar_parquet(tmp_path / "cifar10")
    file = tmp_path / "cifar10" / "train.parquet"
    table = pyarrow.parquet.read_table(file)
    damaged = [
        (table.replace_schema_metadata({"huggingface": text}), "has metadata that are not the hub's, or are damaged")
        for text in ("{", "[]", '{"info": 3}', "\ud7ff".encode("utf-16"), "[" * 100_000)
    ]
    text = pyarrow.array(["a"] * len(table))
    damaged += [(table.set_column(0, "img", pyarrow.StructArray.from_arrays([text], ["bytes"])), "row 0 has no bytes")]
    for content, message in damaged:
        pyarrow.parquet.write_table(content, file)
        with pytest.raises(DatasetError, match=rf"train\.parquet.*{message}"):
            load_cifar10(str(tmp_path))


def test_text_in_a_parquet_file_that_is_none_is_named(tmp_path: Path) -> None:
    hub_data.save({"train": hub_data.femnist_split()}, tmp_path / "femnist")
    file = tmp_path / "femnist" / "train.parquet"
    table = pyarrow.parquet.read_table(file)
    writers = pyarrow.array([b"\xff"] * len(table), pyarrow.binary()).view(pyarrow.utf8())
    pyarrow.parquet.write_table(table.set_column(1, "writer_id", writers), file)
    with pytest.raises(DatasetError, match=r"train\.parquet is not a parquet file, or is damaged"):
        load_femnist(str(tmp_path))


@pytest.mark.parametrize(("name", "message"), [(b"\xff_nohash_0.wav", r"\\udcff_nohash_0\.wav"), (b"a\nb.wav", "a.*b")])
def test_a_clip_whose_name_is_no_text_is_named(name: bytes, message: str, tmp_path: Path) -> None:
    write_speech(tmp_path)
    (tmp_path / "yes" / "00000000_nohash_0.wav").rename(tmp_path / "yes" / os.fsdecode(name))
    with pytest.raises(DatasetError, match=f"{message}.* has a name that is no text; rename it"):
        load_speech_commands_by_speaker(str(tmp_path))


def test_json_under_a_name_that_is_no_text_is_read(tmp_path: Path) -> None:
    before = checksum(load_femnist(str(write_femnist(tmp_path))))
    file = tmp_path / "femnist" / "train" / "all_data_1.json"
    file.rename(file.with_name(os.fsdecode(b"\xff.json")))
    assert checksum(load_femnist(str(tmp_path))) == before


@pytest.mark.parametrize(
    "pickled",
    [
        pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [10**30]}),
        pickle.dumps([]),
        pickle.dumps(3),
        b"cnumpy\nndarray\n(I99999999999\ntR.",
        b"cnumpy\ndtype\n(S'x'\ntR.",
        b"cnumpy\nndarray\n}b.",
        b"(" * 10,
    ],
)
def test_a_pickle_that_is_no_batch_is_named(pickled: bytes, tmp_path: Path) -> None:
    write_cifar_python(tmp_path / "cifar10", 10)
    (tmp_path / "cifar10" / "data_batch_3").write_bytes(pickled)
    with pytest.raises(DatasetError, match="data_batch_3 is not a CIFAR-10 python batch"):
        load_cifar10(str(tmp_path))


@pytest.mark.parametrize("suffix", ["", ".bin"])
@pytest.mark.parametrize(
    "missing", [["test_batch"], ["data_batch_1"], [f"data_batch_{i}" for i in range(1, 6)]], ids=", ".join
)
def test_missing_batches_are_named(missing: list[str], suffix: str, tmp_path: Path) -> None:
    (write_cifar_binary if suffix else write_cifar_python)(tmp_path / "cifar10")
    for name in missing:
        (tmp_path / "cifar10" / f"{name}{suffix}").unlink()
    with pytest.raises(DatasetError, match=f"lacks {', '.join(name + suffix for name in missing)}$"):
        load_cifar10(str(tmp_path))


SERVERS: dict[str, tuple[Callable[[Path], object], str, dict[str, Any]]] = {
    "cifar10": (write_cifar_images, "train", {"width": 4}),
    "femnist": (write_femnist, "femnist/train", {"model": "leaf_cnn"}),
}


@pytest.mark.parametrize("name", SERVERS)
def test_a_server_whose_nodes_have_the_training_data_needs_none(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write, train, settings = SERVERS[name]
    write(tmp_path / "whole")
    write(tmp_path / "server")
    shutil.rmtree(tmp_path / "server" / train)
    whole, dataset = (load_dataset(name, str(tmp_path / root)) for root in ("whole", "server"))
    assert torch.equal(dataset.test.images, whole.test.images)
    assert torch.equal(dataset.test.labels, whole.test.labels)
    assert dataset.train.images.shape == (0, *whole.train.images.shape[1:])
    assert (dataset.train.images.dtype, dataset.train.labels.dtype) == (torch.uint8, torch.int64)
    assert dataset.clients == {}
    settings = settings | {
        "dataset": name, "root": str(tmp_path / "server"), "clients": 1, "clients_per_round": 1, "rounds": 1,
        "threads": 1,
    }  # fmt: skip
    for partition in ("lda", "natural"):
        with pytest.raises(ExperimentError, match=f"server has no training part, which partition = '{partition}' "):
            check_fits(Experiment(partition=partition, **settings), dataset)
    experiment = Experiment(partition="node", **settings)
    check_fits(experiment, dataset)

    def at_node(message: Message, context: Context) -> Message:
        return client_app(message, dataclasses.replace(context, node_config={"root": str(tmp_path / "whole")}))

    out = run(experiment, tmp_path / "run", client=at_node)  # type: ignore[arg-type]
    (record,) = read_lines(out / "rounds.jsonl")
    assert record["examples"] == len(validation_split(torch.arange(len(whole.train.labels)), 0.1, 1, 0)[0])
    assert 0 <= record["test_accuracy"] <= 1
    with pytest.raises(RoundError, match="server has no training part; add one"):
        run(dataclasses.replace(experiment, name="alone"), tmp_path / "alone")
    assert main(["data", "check", name, "--root", str(tmp_path / "server")]) == 1
    assert "not as published" in capsys.readouterr().out


def test_fewer_samples_than_clients_say_how_to_give_their_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_cifar_images(tmp_path)
    assert main(["data", "check", "cifar10", "--root", str(tmp_path)]) == 2
    assert "clients = 100: expected 1 to 10, the number of training samples; give their number with --clients N" in (
        capsys.readouterr().err.replace("\n", " ")
    )
    assert main(["data", "check", "cifar10", "--root", str(tmp_path), "--clients", "10"]) == 1
    assert main(["data", "check", "cifar10", "--root", str(tmp_path), "--clients", "11"]) == 2
    assert "--clients N" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--alpha", "0", "alpha = 0.0: expected a number from"),
        ("--partition", "natural", "the data set has no clients of its own; use partition = 'lda'"),
        ("--seed", "-1", "argument --seed: '-1' is not a whole number of 0 or more"),
    ],
)
def test_another_mistake_does_not_ask_for_the_number_of_clients(
    option: str, value: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with contextlib.suppress(SystemExit):  # argparse's way out
        assert main(["data", "check", "mnist5k", option, value]) == 2
    printed = " ".join(capsys.readouterr().err.split())
    assert message in printed
    assert "give their number" not in printed
