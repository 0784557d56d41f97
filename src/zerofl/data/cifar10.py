"""CIFAR-10 from a local folder or archive: the original python or binary batches, class folders, or parquet files."""

import functools
import io
import pickle
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Self

import numpy as np
import torch

from zerofl.data.dataset import Augmentation, Dataset, DatasetError, Split
from zerofl.data.files import read_file, reading, visible
from zerofl.data.hub import parquet_files, read_images
from zerofl.data.image import decode_image
from zerofl.data.source import Published
from zerofl.errors import some

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

PUBLISHED = Published(
    (
        {"training samples": 50_000, "test samples": 10_000}
        | {f"training samples of {name}": 5_000 for name in CLASSES}
        | {f"test samples of {name}": 1_000 for name in CLASSES},
    ),
    checksum="612671e6bb37e8b15ec4552378c264385574c06bf77b146df22c121b3b667b99",
    content="dd79df4c25482d0269908bfc9eeb7737a148e217e0e479f44ec0efb91fc152f1",
)
BATCHES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
ARCHIVES = ("cifar-10-python.tar.gz", "cifar-10-binary.tar.gz")
FOLDERS = ("", "cifar-10-batches-py", "cifar-10-batches-bin", "cifar10")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
OTHER_IMAGES = (".avif", ".gif", ".heic", ".jfif", ".jp2", ".pgm", ".ppm", ".tif", ".tiff")
DEFLATE64 = 9  # the method of a zip's member; Windows takes it for files of 2 GB and more

Files = dict[PurePosixPath, Callable[[], bytes]]
"""The files of a folder or archive, by path, each with what reads it."""


def load_cifar10(root: str) -> Dataset:
    """50,000 training and 10,000 test images [3, 32, 32], 10 classes.

    `root` is the folder that holds `data_batch_1` (or `data_batch_1.bin`, or `train/` and `test/` with a folder of
    images for each class, or the hub's `train*.parquet` and `test*.parquet`), or a folder, or except for parquet files
    an archive, that holds that. Class folders and the hub's files give the images in another order than the batches.
    Of class folders `train/` and `test/` one may be missing, and is then empty: clients that train on data of their
    own need no `test/`, and a server that only evaluates no `train/`. A class that there are no images of is an empty
    folder.

    Raises:
        DatasetError: nothing of this kind is there, or what is there is incomplete, damaged, encrypted or unreadable;
            it names the file.
    """
    source = Path(root).expanduser()
    with reading("cifar10", source):
        files = _files(source)
        tables = {} if files else parquet_files(source, FOLDERS)
        if tables:
            train, test = (_read_tables(tables, source, part) for part in BATCHES)
        else:
            train, test = (_read_part(files, source, part) for part in BATCHES)
    return Dataset(
        train,
        test,
        classes=CLASSES,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        clients={},
        augmentation=Augmentation(background=0, mirrored=True),
    )


def _read_part(files: Files, source: Path, part: str) -> Split:
    by_name = {path.name: (path, read) for path, read in files.items()}
    for suffix, parse in (("", _parse_python_batch), (".bin", _parse_binary_batch)):
        if any(name + suffix in by_name for names in BATCHES.values() for name in names):
            missing = [name + suffix for name in BATCHES[part] if name + suffix not in by_name]
            if missing:
                raise DatasetError(f"cifar10: {source} lacks {', '.join(missing)}")
            found = [by_name[name + suffix] for name in BATCHES[part]]
            parsed = [parse(read(), f"{source}: {path}") for path, read in found]
            images, labels = (np.concatenate(arrays) for arrays in zip(*parsed, strict=True))
            return Split(torch.from_numpy(images).view(-1, 3, 32, 32), torch.from_numpy(labels))
    _refuse_other_images(files, source, part)
    by_class = _class_images(files, part)
    if not any(by_class.values()):
        if any(any(_class_images(files, other).values()) for other in BATCHES if other != part):
            return Split(torch.empty(0, 3, 32, 32, dtype=torch.uint8), torch.empty(0, dtype=torch.int64))
        raise DatasetError(_not_found(source))
    homes = sorted({path.parents[2] for paths in by_class.values() for path in paths})
    if len(homes) > 1:  # copies would count as often
        places = ", ".join(str(source / home) for home in homes)
        raise DatasetError(
            f"cifar10: {source} holds {part}/ {len(homes)} times, in {places}; expected one: take the others away"
        )
    missing = [
        CLASSES[label]
        for label, paths in by_class.items()
        if not paths and not (source / homes[0] / part / CLASSES[label]).is_dir()
    ]
    if missing:
        unpacked = "unpack the archive, and " if source.is_file() else ""  # only the files in one are known
        raise DatasetError(
            f"cifar10: {source} has no images in {part}/ for the classes {', '.join(missing)}; if it is to have none "
            f"of them, {unpacked}make an empty folder for each"
        )
    decoded = [
        decode_image(files[path](), "RGB", 32, f"cifar10: {source}: {path}")
        for paths in by_class.values()
        for path in paths
    ]
    labels = np.repeat(np.arange(len(CLASSES)), [len(paths) for paths in by_class.values()])
    return _split(decoded, labels)


def _class_images(files: Files, part: str) -> dict[int, list[PurePosixPath]]:
    """The images of each class in class folders: .../train/airplane/anything.png."""
    return {label: _of_class(files, part, name, IMAGE_SUFFIXES) for label, name in enumerate(CLASSES)}


def _of_class(files: Files, part: str, name: str, suffixes: tuple[str, ...]) -> list[PurePosixPath]:
    return sorted(p for p in files if p.parts[-3:-1] == (part, name) and p.suffix.lower() in suffixes)


def _refuse_other_images(files: Files, source: Path, part: str) -> None:
    """Images of another kind would be missing without a word, and with them maybe a whole class or part."""
    others = [path for name in CLASSES for path in _of_class(files, part, name, OTHER_IMAGES)]
    if others:
        raise DatasetError(
            f"cifar10: {source}: {some(others)}: expected {', '.join(IMAGE_SUFFIXES)} only. Convert them, or take them "
            "out of the folder"
        )


def _read_tables(tables: dict[str, list[Path]], source: Path, split: str) -> Split:
    decoded, labels = [], []
    for path in tables.get(split, []):
        for image, label, _ in read_images(path, "img", "label", (), "RGB", 32, CLASSES, "cifar10: "):
            decoded.append(image)
            labels.append(label)
    if not decoded:
        raise DatasetError(f"cifar10: {source} has parquet files, but no images in {split}*.parquet")
    return _split(decoded, np.array(labels))


def _split(images: list[np.ndarray], labels: np.ndarray) -> Split:
    """Images uint8 [32, 32, 3] and labels int64 [N]."""
    return Split(torch.from_numpy(np.stack(images).transpose(0, 3, 1, 2).copy()), torch.from_numpy(labels))


def _files(source: Path) -> Files:
    """Every file that may matter below the folder, or in the archive, `source`."""
    if source.is_dir():
        archives = [source / name for name in ARCHIVES if (source / name).is_file()]
        paths = [path for name in FOLDERS for path in _in_folder(source / name)]
        files: Files = {
            PurePosixPath(path.relative_to(source).as_posix()): functools.partial(read_file, "cifar10", path)
            for path in paths
        }
        return files if files or not archives else _files(archives[0])
    if not source.is_file():
        raise DatasetError(_not_found(source))
    files = _in_zip(source) if zipfile.is_zipfile(source) else _in_tar(source)
    return {path: read for path, read in files.items() if _matters(path)}


def _in_folder(folder: Path) -> list[Path]:
    batches = [path for path in visible(folder) if path.name.startswith(("data_batch_", "test_batch"))]
    return [*batches, *(path for part in BATCHES for of_class in visible(folder / part) for path in visible(of_class))]


def _in_zip(source: Path) -> Files:
    with _unpacking(str(source)):
        archive = zipfile.ZipFile(source)

    def read(member: zipfile.ZipInfo) -> bytes:
        with _unpacking(f"{source}: {member.filename}"):
            if member.compress_type == DEFLATE64:
                raise NotImplementedError("it is packed with Deflate64, which Python does not read")
            return archive.read(member)

    # Some tools of Windows separate folders by a backslash.
    names = {member.filename.replace("\\", "/"): member for member in archive.infolist()}
    return {
        PurePosixPath(name): functools.partial(read, member) for name, member in names.items() if not name.endswith("/")
    }


def _in_tar(source: Path) -> Files:
    with _unpacking(str(source)):
        is_tar = tarfile.is_tarfile(source)
    if not is_tar:
        raise DatasetError(f"cifar10: {source} is neither a folder nor a tar or zip archive")
    with _unpacking(str(source)), tarfile.open(source, tarinfo=_StrictTarInfo) as tar:
        # In one pass, since a compressed tar can only be read from its start.
        contents = {PurePosixPath(m.name): tar.extractfile(m).read() for m in tar if m.isfile()}  # type: ignore[union-attr]
        while rest := tar.fileobj.read(2**20):  # to the end of the file, where the checksum of its bytes is
            if rest.strip(b"\0"):
                raise tarfile.ReadError("it continues after an empty header, which is a tar's end")
    return {path: lambda data=data: data for path, data in contents.items()}  # type: ignore[misc]


class _StrictTarInfo(tarfile.TarInfo):
    """A member's header. tarfile takes a damaged one for the end, and the members after it would be missing."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.HeaderError as error:
            at_its_end = isinstance(error, tarfile.EOFHeaderError)  # type: ignore[attr-defined]
            if at_its_end or not tarfile_.offset:  # at the start the other ways of compression are yet to be tried
                raise
            raise tarfile.ReadError(f"it has no header at byte {tarfile_.offset}: {error}") from error


@contextmanager
def _unpacking(where: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # what zipfile says of encryption and of methods that it does not know
        raise DatasetError(
            f"cifar10: {where} cannot be read: {error}. Unpack the archive, and give the folder with --root"
        ) from error
    except Exception as error:  # tarfile, zipfile and each way of compression have errors of their own
        raise DatasetError(f"cifar10: {where} cannot be read, it may be truncated: {error}") from error


def _matters(path: PurePosixPath) -> bool:
    """Not one of the hidden files, such as the shadows that macOS puts beside the real ones of the same name."""
    return "__MACOSX" not in path.parts and not path.name.startswith(".")


def _not_found(source: Path) -> str:
    return (
        f"cifar10: found neither data_batch_1, nor data_batch_1.bin, nor train/airplane/, nor train*.parquet in "
        f"{source.absolute()} or its folders {', '.join(name for name in FOLDERS if name)}. Get cifar-10-python.tar.gz "
        "from https://www.cs.toronto.edu/~kriz/cifar.html and give the folder or the archive itself with --root, or "
        "download it with: zerofl data fetch cifar10 --root DIR"
        + (". Parquet files are read from a folder only: unpack their archive" if source.is_file() else "")
    )


def _parse_binary_batch(data: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Records of 1 label and 3,072 pixels -> images uint8 [N, 3072], labels int64 [N]."""
    if not data or len(data) % 3073:
        raise DatasetError(f"cifar10: {where} has {len(data)} bytes, expected a multiple of 3073; it may be truncated")
    records = np.frombuffer(data, np.uint8).reshape(-1, 3073)
    return _checked(records[:, 1:].copy(), records[:, 0].astype(np.int64), where)


def _parse_python_batch(data: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    """A pickled dict with b"data" uint8 [N, 3072] and b"labels" -> images uint8 [N, 3072], labels int64 [N]."""
    try:
        batch = _BatchUnpickler(io.BytesIO(data), encoding="bytes").load()
        images, labels = np.asarray(batch[b"data"]), np.asarray(batch[b"labels"], np.int64)
    except Exception as error:  # a damaged pickle asks for anything, and so fails with anything
        raise DatasetError(f"cifar10: {where} is not a CIFAR-10 python batch, or is truncated: {error!r}") from error
    return _checked(images, labels, where)


class _BatchUnpickler(pickle.Unpickler):
    """Reads numpy arrays and plain containers only: a pickle from elsewhere must not run code."""

    ALLOWED: ClassVar = {
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which a batch does not need")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _checked(images: np.ndarray, labels: np.ndarray, where: str) -> tuple[np.ndarray, np.ndarray]:
    if images.dtype != np.uint8 or images.ndim != 2 or images.shape[1] != 3072 or len(images) != len(labels):
        raise DatasetError(
            f"cifar10: {where} has data {images.dtype} {images.shape} and {len(labels)} labels, "
            "expected uint8 (N, 3072) and N"
        )
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(CLASSES):
        raise DatasetError(f"cifar10: {where} has labels {labels.min()} to {labels.max()}, expected 0 to 9")
    return images, labels
