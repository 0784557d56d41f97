"""What the kernels' files may include: they are compiled once for each instruction set."""

import re
from pathlib import Path

import pytest

CPP = Path(__file__).parents[2] / "cpp"
LIBRARY = (CPP.parent / "CMakeLists.txt").read_text().split("add_library")[1].split(")")[0]
KERNELS = re.findall(r"cpp/(\w+\.cpp)", LIBRARY)
# Plain C, and the compilers' own functions: an inline function of the C++ library would be kept once, perhaps compiled
# for an instruction set that this processor does not have.
ALLOWED = {"kernels.h", "simd.h", "stdint.h", "string.h", "immintrin.h"}


@pytest.mark.parametrize("file", [*KERNELS, "kernels.h", "simd.h"])
def test_a_kernel_includes_nothing_of_the_cpp_library(file: str) -> None:
    included = set(re.findall(r"#include\s*[<\"]([^>\"]+)", (CPP / file).read_text()))
    assert included <= ALLOWED


def test_the_kernels_are_found() -> None:
    assert {"convolution.cpp", "linear.cpp", "table.cpp"} <= set(KERNELS)
