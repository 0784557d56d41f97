import pickle
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from zerofl.sparse import dispatch

needs_kernels = pytest.mark.skipif(dispatch.UNAVAILABLE is not None, reason="no native kernels")

# A shell starts a background job with SIGINT ignored; what the tests start and interrupt would ignore it too.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    if dispatch.UNAVAILABLE:  # then it is said once, in whichever test comes first
        config.addinivalue_line("filterwarnings", "ignore:zerofl's native kernels are not installed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is asked of the kernels by name where there are none."""
    for item in items if dispatch.UNAVAILABLE else ():
        if isinstance(item, pytest.Function) and "native" in _values(item):
            item.add_marker(needs_kernels)


def pytest_runtest_setup() -> None:
    """A test sees the same random numbers alone and among others; some gradients differ at one start in a hundred."""
    torch.manual_seed(0)


def _values(item: pytest.Function) -> list[str]:
    """The words among the values that a test is called with."""
    called_with = item.callspec.params if hasattr(item, "callspec") else {}
    return [value for value in called_with.values() if isinstance(value, str)]


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Bitwise comparisons hold for a given number of threads; one is what every machine has."""
    torch.set_num_threads(1)


def cifar_batch(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [count, 3072] that a model can learn (the label sets the brightness) and their labels [count]."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % 10
    images = generator.integers(0, 30, (count, 3072)) + labels[:, None] * 20
    return images.astype(np.uint8), labels


def write_cifar_python(folder: Path, per_batch: int = 40) -> None:
    """Small batches in the original python format."""
    folder.mkdir(parents=True)
    for seed, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        images, labels = cifar_batch(seed, per_batch)
        content = {b"batch_label": name.encode(), b"labels": labels.tolist(), b"data": images, b"filenames": []}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))


@pytest.fixture(scope="session")
def cifar_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with CIFAR-10's python batches, 200 training and 40 test images."""
    root = tmp_path_factory.mktemp("cifar")
    write_cifar_python(root / "cifar-10-batches-py")
    return root
