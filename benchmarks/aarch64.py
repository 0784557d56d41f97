"""What the kernels' inner loops should take on ARM processors, which nothing here has: estimates, not measurements.

    apt-get install g++-aarch64-linux-gnu qemu-user llvm-19
    python benchmarks/aarch64.py                    2 minutes; writes benchmarks/results/kernels/aarch64.json

Two kinds. llvm-mca reads the compiled loop and says how many cycles an entry takes when all it reads is in the first
cache; it has models of the Cortex-A55, and of the Neoverse N1 and V1, the servers' versions of the Cortex-A76 and X1.
The same of the AVX2 loop on a Zen 3 stands beside, for which the time is known. And an emulator counts the instructions
of whole passes of a convolution of ResNet-18 at 95 %: with packing of windows, loops' ends and stores.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CPP = HERE.parent / "cpp"
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=fast", f"-I{CPP}"]  # as in CMakeLists.txt
TARGETS = {
    "aarch64": ["aarch64-linux-gnu-g++", "-DISA=baseline", "-DKERNELS=kernels_baseline", "-mtune=cortex-a76"],
    "avx2": ["g++", "-DISA=avx2", "-DKERNELS=kernels_avx2", "-mavx2", "-mfma", "-mbmi", "-mpopcnt", "-mf16c"],
}
CORES = {
    "Cortex-A55": ("aarch64", "aarch64", "cortex-a55"),
    "Cortex-A76 (Neoverse N1)": ("aarch64", "aarch64", "neoverse-n1"),
    "Cortex-X1 (Neoverse V1)": ("aarch64", "aarch64", "neoverse-v1"),
    "AVX2 (Zen 3)": ("avx2", "x86_64", "znver3"),
}
# The multiply-adds of vectors in a loop, by which it is found, and for how many products of numbers these are.
LOOPS = {
    "forward and grad_input": ("convolution", {"aarch64": 16, "avx2": 8}, 64),
    "grad_weight, 3x3": ("weight_gradient", {"aarch64": 9, "avx2": 9}, None),
}
EMULATORS = {"aarch64": ["qemu-aarch64"], "avx2": ["qemu-x86_64", "-cpu", "max"]}
BRANCH = re.compile(r"\s+(?:b\.?\w+|cbn?z|tbn?z|j\w+)\s+(?:.*,\s*)?(\.L\w+)\s*$")


def main() -> None:
    """Write the record and print it."""
    mca = next((name for name in ("llvm-mca-19", "llvm-mca") if shutil.which(name)), None)
    missing = [name for name in ("aarch64-linux-gnu-g++", "qemu-aarch64", "qemu-x86_64") if not shutil.which(name)]
    if mca is None or missing:
        sys.exit(f"not installed: {', '.join([*missing, *([] if mca else ['llvm-mca'])])}; see this file's first lines")
    with tempfile.TemporaryDirectory() as folder:
        loops = [estimate(mca, core, loop, Path(folder)) for loop in LOOPS for core in CORES]
        counts = count_instructions(Path(folder))
    record = {"llvm_mca": version(mca), "compiler": version("aarch64-linux-gnu-g++"), "loops": loops, "counts": counts}
    (HERE / "results/kernels/aarch64.json").write_text(json.dumps(record, indent=1) + "\n")
    for row in loops:
        what = f"{row['loop']:24} {row['core']:26}"
        print(f"{what} {row['cycles']:6.2f} cycles, {row['instructions']:3} instructions an entry")
    for row in counts:
        print(f"{row['pass']:24} {row['target']:26} {row['instructions_an_entry']:6.1f} instructions an entry in all")


def estimate(mca: str, core: str, loop: str, folder: Path) -> dict[str, Any]:
    """The cycles that an entry takes in a loop, by llvm-mca: a non-zero that meets a tile, or a vector of channels."""
    target, arch, cpu = CORES[core]
    source, multiply_adds, products = LOOPS[loop]
    assembly = folder / f"{source}-{target}.s"
    run(*TARGETS[target], *FLAGS, "-S", "-o", assembly, CPP / "kernels" / f"{source}.cpp")
    body = loop_of(assembly.read_text().splitlines(), multiply_adds[target])
    report = json.loads(
        run(mca, f"-march={arch.replace('_', '-')}", f"-mcpu={cpu}", "-iterations=500", "-json", input="\n".join(body))
    )
    summary = report["CodeRegions"][0]["SummaryView"]
    return {
        "loop": loop,
        "core": core,
        "model": cpu,
        "cycles": summary["TotalCycles"] / summary["Iterations"],
        "instructions": summary["Instructions"] // summary["Iterations"],
        "products": products or multiply_adds[target] * {"aarch64": 4, "avx2": 8}[target],
    }


def loop_of(lines: list[str], multiply_adds: int) -> list[str]:
    """The first innermost loop with so many multiply-adds of vectors, without its labels."""
    labels = {match[1]: i for i, line in enumerate(lines) if (match := re.match(r"(\.L\w+):", line))}
    for i, line in enumerate(lines):
        branch = BRANCH.match(line)
        if branch and labels.get(branch[1], i) < i:
            body = lines[labels[branch[1]] + 1 : i + 1]
            if sum(bool(BRANCH.match(each)) for each in body) == 1:
                code = [each for each in body if re.match(r"\s+[a-z]", each)]
                if sum("fmla" in each or "vfmadd" in each for each in code) == multiply_adds:
                    return code
    raise SystemExit(f"no loop with {multiply_adds} multiply-adds: the compiler made something else of the source")


def count_instructions(folder: Path) -> list[dict[str, Any]]:
    """The instructions of whole passes, for each entry that meets a tile of 64 numbers, counted by an emulator."""
    plugin = folder / "count.so"
    run("gcc", "-O2", "-shared", "-fPIC", "-o", plugin, HERE / "count_instructions.c")
    rows = []
    for target, compiler in TARGETS.items():
        program = folder / f"one-{target}"
        sources = [*CPP.glob("kernels/*.cpp"), *CPP.glob("ops/*.cpp"), *CPP.glob("runtime/*.cpp"), HERE / "aarch64.cpp"]
        run(*compiler, *FLAGS, "-static", "-o", program, *sources, "-lpthread")
        for each in ("forward", "grad_input", "grad_weight"):
            counts, products = [], 0
            for times in ("1", "2"):
                command = [*EMULATORS[target], "-plugin", plugin, program, each, times]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                counts.append(int(done.stderr.split()[-1]))
                products = int(done.stdout)
            entry = (counts[1] - counts[0]) / (products / 64)
            rows.append({"pass": each, "target": target, "instructions_an_entry": entry})
    return rows


def version(command: str) -> str:
    """The line in which a program tells its version."""
    return next(line.strip() for line in run(command, "--version").splitlines() if re.search(r"\d+\.\d", line))


def run(*command: str | Path, input: str | None = None) -> str:
    """The command's output; ends the program where it fails."""
    done = subprocess.run([str(part) for part in command], input=input, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stderr[-2000:]}")
    return done.stdout


if __name__ == "__main__":
    main()
