"""What a kernel's object file may define: each is compiled once for each instruction set, and the linker keeps one copy
of what two of them share, perhaps the one for an instruction set that this processor does not have."""

import shutil
import subprocess
from pathlib import Path

import pytest

KERNELS = sorted((Path(__file__).parents[2] / "cpp" / "kernels").glob("*.cpp"))
COMPILER = shutil.which("c++")
pytestmark = pytest.mark.skipif(not (COMPILER and shutil.which("nm")), reason="needs a C++ compiler and nm")


def defined(source: Path, folder: Path) -> list[tuple[str, str]]:
    """The kind and name of each symbol that the object of `source` shares with others."""
    target = folder / f"{source.stem}.o"
    # Without optimisation nothing is inlined away: what could be shared is there.
    command = [COMPILER, "-std=c++17", "-O0", "-fPIC", "-DISA=probe", "-c", str(source), "-o", str(target)]
    subprocess.run([str(word) for word in command], check=True)
    listed = subprocess.run(
        ["nm", "--demangle", "--defined-only", "--extern-only", str(target)], check=True, capture_output=True, text=True
    )
    return [(kind, name) for _, kind, name in (line.split(" ", 2) for line in listed.stdout.splitlines())]


@pytest.mark.parametrize("source", KERNELS, ids=lambda source: source.stem)
def test_a_kernel_shares_only_what_is_named_after_its_instruction_set(source: Path, tmp_path: Path) -> None:
    symbols = defined(source, tmp_path)
    assert symbols
    for kind, name in symbols:
        assert kind in "TRDB", f"{name} is kept once for all instruction sets"
        assert name.startswith("zerofl::probe::") or name == "zerofl::kernels_probe"


def test_a_function_of_the_library_would_be_seen(tmp_path: Path) -> None:
    source = tmp_path / "bad.cpp"
    source.write_text("#include <vector>\nint first(std::vector<int>& v) { v.push_back(1); return v[0]; }\n")
    assert any(kind == "W" and name.startswith("std::vector") for kind, name in defined(source, tmp_path))
