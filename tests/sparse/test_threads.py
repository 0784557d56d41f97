"""The kernels' own threads, which they start where there is no OpenMP."""

import subprocess
import sys

import pytest

from tests.sparse.operands import _native

# Loaded by its path, the extension is not told of torch's OpenMP.
IN_LITTLE_MEMORY = """
import importlib.util, resource, sys, torch
spec = importlib.util.spec_from_file_location("_native", sys.argv[1])
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
x = torch.arange(1 << 20, dtype=torch.float32)
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (12 << 20),) * 2)
assert native.top_k_threshold(x, 1000, 8) == (1 << 20) - 1000
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits a process's memory")
def test_where_no_more_threads_can_be_started_those_there_are_do_the_work() -> None:
    """A thread's stack takes 8 MB, so that the limit allows one; what could not be started ended the process."""
    assert _native.__file__ is not None
    subprocess.run([sys.executable, "-c", IN_LITTLE_MEMORY, _native.__file__], check=True)
