"""The program that checks the kernels where PyTorch is not: it has to be right on this processor, and to notice."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


def test_kernels_agree_with_plain_loops_and_a_wrong_one_does_not(tmp_path: Path) -> None:
    sources = [ROOT / "tests/sparse/check_kernels.cpp"]
    for folder in ("kernels", "ops", "codec", "runtime"):
        sources += (ROOT / "cpp" / folder).glob("*.cpp")
    objects = {source.name: compiled(source, tmp_path / f"{source.stem}.o") for source in sources}
    program = linked(list(objects.values()), tmp_path / "right")
    done = subprocess.run([program, "5"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "of 5 draws agree with plain loops" in done.stdout
    assert subprocess.run([program]).returncode == 2

    wrong, product = tmp_path / "wrong.cpp", "sum[c][v] += value * load("
    text = (ROOT / "cpp/kernels/convolution.cpp").read_text()
    assert product in text
    wrong.write_text(text.replace(product, "sum[c][v] += value * -load("))
    objects["convolution.cpp"] = compiled(wrong, tmp_path / "wrong.o")
    done = subprocess.run([linked(list(objects.values()), tmp_path / "wrong"), "5"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "where plain loops give" in done.stdout


def compiled(source: Path, to: Path) -> Path:
    include = [f"-I{ROOT / 'cpp'}", f"-I{ROOT / 'cpp/kernels'}"]
    run("-std=c++17", "-O1", "-DISA=baseline", *include, "-c", "-o", to, source)
    return to


def linked(objects: list[Path], to: Path) -> Path:
    run("-o", to, *objects, "-lpthread", "-ldl")
    return to


def run(*arguments: str | Path) -> None:
    done = subprocess.run([str(COMPILER), *map(str, arguments)], capture_output=True, text=True)
    assert not done.returncode, done.stderr
