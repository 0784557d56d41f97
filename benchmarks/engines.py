"""What the engines cost: overhead over the training itself, 3,597 clients, memory over 50 rounds.

python benchmarks/engines.py overhead-0.2 --root CIFAR-10             about 5 minutes; also -0.0 and -2-threads
python benchmarks/engines.py side-by-side --root CIFAR-10            about 2 minutes
python benchmarks/engines.py scale --root FEMNIST [--engine ray]      about 1 minute
python benchmarks/engines.py memory [--engine ray]                    about 2 minutes, 5 on Ray

Each starts `zerofl run` as a process of its own and looks at it and its children (Ray's workers) from outside. With
--json FILE the figures are put into the file under the benchmark's and the engine's name.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from zerofl.run.folder import read_lines
from zerofl.run.origin import origin

# The paper's protocol for one round: 10 of 100 clients with 500 images each. Evaluation is not the engine's.
OVERHEAD = {"dataset": "cifar10", "clients": 100, "clients_per_round": 10, "rounds": 6, "sparsity": 0.95,
            "uplink": "top_k_weights", "evaluate_every": 1000, "threads": 1, "clients_at_once": 1}  # fmt: skip
BENCHMARKS: dict[str, dict[str, Any]] = {
    "overhead-0.2": OVERHEAD | {"mask_ratio": 0.2},
    "overhead-0.0": OVERHEAD | {"mask_ratio": 0.0},
    "overhead-2-threads": OVERHEAD | {"mask_ratio": 0.2, "threads": 2},
    "side-by-side": OVERHEAD | {"mask_ratio": 0.2, "clients_at_once": 2},
    # FEMNIST's number of clients, on as many writers as there are, dealt anew.
    "scale": {"dataset": "femnist", "model": "leaf_cnn", "clients": 3597, "clients_per_round": 35, "rounds": 3,
              "batch_size": 20, "uplink": "top_k_weights_diff", "threads": 1, "evaluate_every": 1000},
    "memory": {"dataset": "mnist5k", "model": "leaf_cnn", "clients": 50, "clients_per_round": 5, "rounds": 50,
               "batch_size": 16, "uplink": "top_k_weights_diff", "threads": 1, "evaluate_every": 1},
}  # fmt: skip


class Seen(NamedTuple):
    """A line that the run printed, when (seconds since its start), and the memory of it and its children then."""

    line: str
    seconds: float
    resident_bytes: int


def resident_bytes(process: int) -> int:
    """The proportional memory (PSS: what is shared counts once) of a process and all its descendants, in bytes."""
    total = 0
    try:
        rollup = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="ascii")
        total = 1024 * next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
        for task in Path(f"/proc/{process}/task").iterdir():
            total += sum(resident_bytes(int(child)) for child in (task / "children").read_text().split())
    except (OSError, StopIteration):
        pass  # it has just ended
    return total


def watch(name: str, engine: str, root: str | None, out: Path) -> list[Seen]:
    """Run a benchmark's experiment and look at it after each round."""
    settings = [word for key, value in BENCHMARKS[name].items() for word in ("--set", f"{key}={value}")]
    preset = out.with_name("run.toml")
    preset.write_text('[[run]]\nname = "run"\n', encoding="utf-8")
    command = [sys.executable, "-u", "-m", "zerofl.cli", "run", str(preset), "--out", str(out), "--engine", engine]
    command += settings + (["--root", root] if root else [])
    seen, started = [], time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "  round " in line:
                seconds = time.perf_counter() - started
                # The kernel stops a process for as long as it counts its memory, which is not the engine's time.
                memory = 0 if name.startswith(("overhead", "side")) else resident_bytes(process.pid)
                seen.append(Seen(line.strip(), seconds, memory))
                print(f"{seen[-1].resident_bytes / 1e6:7.0f} MB  {line}", end="", flush=True)
    if process.returncode:
        sys.exit(f"the run ended with status {process.returncode}")
    return seen


def figures(name: str, seen: list[Seen], rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """What the benchmark is for."""
    if name.startswith("overhead"):
        # The first round also loads what the others have, and after the last one the model is tested. Seen from outside
        # a round takes in its checkpoint.
        seconds = seen[-2].seconds - seen[0].seconds
        train_seconds = sum(r["train_seconds"] for r in rounds[1:-1])
        return {"round_seconds": seconds, "train_seconds": train_seconds, "overhead": seconds / train_seconds - 1}
    if name == "side-by-side":
        return {"round_seconds": seen[-2].seconds - seen[0].seconds}
    if name == "scale":
        start = seen[0].seconds - rounds[0]["seconds"]
        peak = max(look.resident_bytes for look in seen)
        return {"start_seconds": start, "round_seconds": [r["seconds"] for r in rounds], "resident_bytes": peak}
    fifth, last = seen[4].resident_bytes, seen[-1].resident_bytes
    return {"resident_bytes_round_5": fifth, "resident_bytes_round_50": last, "growth": last / fifth - 1}


def main() -> None:
    """Run one benchmark, print its figures and put them into the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=tuple(BENCHMARKS))
    parser.add_argument("--engine", choices=("in-process", "ray"), default="in-process")
    parser.add_argument("--root")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        seen = watch(options.benchmark, options.engine, options.root, out)
        result = figures(options.benchmark, seen, read_lines(out / "run" / "rounds.jsonl"))
    print(json.dumps(result, indent=1))
    if options.json:
        record = json.loads(options.json.read_text()) if options.json.exists() else {}
        settings = BENCHMARKS[options.benchmark]
        record[f"{options.benchmark}, {options.engine}"] = result | {
            "settings": settings, **origin()
        }  # fmt: skip
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
