"""What takes long to read is read once: its tensors stay on the disk until the files they came from change."""

import contextlib
import hashlib
import os
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from zerofl.data.temporary import folder_beside


def cache_folder() -> Path:
    """`$ZEROFL_CACHE`, else `zerofl` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("ZEROFL_CACHE") or Path(base) / "zerofl")


def cached(purpose: str, sources: Iterable[Path], make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What `make` gives, from the disk if it was made before for this purpose from the same files.

    Files are the same if path, size and time of change are. Put a version into `purpose` and raise it when `make`
    gives something else. A damaged file is made anew. A cache that cannot be written costs time only, and a warning
    says so.
    """
    digest = hashlib.sha256()
    for path in sorted(sources):
        status = path.stat()
        digest.update(f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\n".encode(errors="surrogateescape"))
    file = cache_folder() / f"{purpose}-{digest.hexdigest()[:16]}.safetensors"
    if file.exists():
        # A damaged one, of a full disk or a copy cut short, is made anew.
        with contextlib.suppress(SafetensorError, OSError):
            return safetensors.torch.load_file(file)
    tensors = make()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with folder_beside(file) as own:
            safetensors.torch.save_file(tensors, own / "new")
            with (own / "new").open("rb+") as written:
                os.fsync(written.fileno())  # before it has its name: else a power cut may leave zeros under it
            os.replace(own / "new", file)
    except (SafetensorError, OSError) as error:  # a full disk is safetensors' own error
        warnings.warn(f"{file.parent} cannot be written, the next start reads the data anew: {error}", stacklevel=2)
    return tensors
