"""What a fixed set of short runs computes, as SHA-256: a change of the code that should change no result changes none.

python benchmarks/same_bytes.py            compare with benchmarks/results/same_bytes.json, made on the same kernels
python benchmarks/same_bytes.py --write    make that file anew

A run's model is hashed as its tensors, its rounds without their times. Takes about a minute on two cores; needs Ray,
and no data set.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from shutil import copytree

import numpy as np
import safetensors.torch
import torch

from zerofl.exchange.uplink import UPLINKS, make_update
from zerofl.exchange.wire import POSITIONS, VALUES, encode, encode_state, schema_of
from zerofl.run.origin import origin
from zerofl.sparse.dispatch import isa

PROJECT = Path(__file__).parents[1]
RECORD = PROJECT / "benchmarks" / "results" / "same_bytes.json"
NOT_RESULTS = ("seconds", "train_seconds", "train_cpu_seconds", "train_joules", "train_joules_estimate", "format")
"""Of a round's record: times, energy, and in which form it is written."""

TINY = """
[base]
dataset = "mnist5k"
model = "resnet18"
width = 16
clients = 200
clients_per_round = 3
rounds = 3
sparsity = 0.9
mask_ratio = 0.1
validate_every = 2
snapshot_every = 2
threads = 1
"""
ROW = '[[run]]\nname = "{uplink}-{optimizer}"\nuplink = "{uplink}"\nserver_optimizer = "{optimizer}"\n'

QUICKSTART = """
import torch
from flwr.app import Context, RecordDict
from zerofl.flower.engines import RUN_ID, SERVER_NODE_ID, InProcessGrid
from quickstart import client_app, server_app
torch.set_num_threads(1)
torch.manual_seed(1)
config = {"num-server-rounds": 2, "fraction-train": 1.0, "local-epochs": 1, "lr": 0.02}
context = Context(RUN_ID, SERVER_NODE_ID, {}, RecordDict(), config)
server_app.app(InProcessGrid(client_app.app, 2, config), context)
print("result", sorted((key, repr(value)) for key, value in context.state["final"].items()))
"""


def main() -> int:
    """Run everything, and write or compare the hashes; returns 1 if one differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write {RECORD.relative_to(PROJECT)}")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for name, digest in digests(Path(folder)):
            print(f"{digest[:16]}  {name}", flush=True)
            found[name] = digest
    if options.write:
        record = {"isa": isa(), "sha256": found, **origin()}
        RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        return 0
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    if record["isa"] != isa():
        print(f"the record was made with {record['isa']}, here is {isa()}: set ZEROFL_ISA={record['isa']}")
        return 1
    different = [name for name in {**record["sha256"], **found} if record["sha256"].get(name) != found.get(name)]
    print("\n".join(f"differs: {name}" for name in different) or "all as recorded")
    return 1 if different else 0


def digests(folder: Path) -> Iterator[tuple[str, str]]:
    """What each run computes, by name."""
    for name, payload in payloads():
        yield f"payload {name}", hashlib.sha256(payload).hexdigest()
    tiny = folder / "tiny.toml"
    rows = [ROW.format(uplink=uplink, optimizer=o) for uplink in UPLINKS for o in ("fedavg", "fedadam")]
    tiny.write_text(TINY + "".join(rows), encoding="utf-8")
    yield from run(folder / "tiny", tiny)
    yield from run(folder / "demo", "demo", "--set", "rounds=3", "--set", "threads=1")
    one = (tiny, "--only", "top_k_weights_diff-fedadam")
    yield from run(folder / "ray", *one, "--engine", "ray")
    kill_after_round_1(folder / "killed", *one)
    yield from run(folder / "killed", *one, "--resume")
    app = copytree(PROJECT / "examples" / "quickstart-pytorch", folder / "app")
    subprocess.run(["git", "apply", "zerofl.diff"], cwd=app, check=True)
    done = subprocess.run([sys.executable, "-c", QUICKSTART], cwd=app, check=True, capture_output=True, text=True)
    yield "quickstart", hashlib.sha256(done.stdout.rpartition("result")[2].encode()).hexdigest()


def payloads() -> Iterator[tuple[str, bytes]]:
    """The update of a made-up training in every form on the wire, and the model itself."""
    generator = np.random.default_rng(1)
    shapes = {"conv.weight": (32, 16, 3, 3), "bn.running_mean": (32,), "fc.weight": (10, 32)}
    received, change = (
        {name: torch.from_numpy(generator.standard_normal(shape, np.float32)) for name, shape in shapes.items()}
        for _ in range(2)
    )
    trained = {name: received[name] + 0.01 * change[name] for name in shapes}
    for state, batches in ((received, 3), (trained, 8)):
        state["bn.num_batches_tracked"] = torch.tensor(batches)
    schema = schema_of(received)
    yield "state", encode_state(received, schema)
    for uplink in UPLINKS:
        update = make_update(uplink, received, trained, ["conv.weight"], 0.9, 0.1)
        for values in VALUES:
            for positions in POSITIONS:
                if positions == "csr" and values != "float32":
                    continue
                rng = np.random.default_rng(2)
                yield (
                    f"{uplink} {values} {positions}",
                    encode(update, schema, values=values, positions=positions, generator=rng),
                )


def run(out: Path, *arguments: str | Path) -> Iterator[tuple[str, str]]:
    """Hashes of the runs of a file or preset."""
    subprocess.run(command(out, *arguments), check=True, stdout=subprocess.DEVNULL)
    for directory in sorted(path for path in out.iterdir() if path.is_dir()):
        model = safetensors.torch.save(safetensors.torch.load_file(directory / "model.safetensors"))
        yield f"{out.name}/{directory.name} model", hashlib.sha256(model).hexdigest()
        lines = (directory / "rounds.jsonl").read_text(encoding="utf-8").splitlines()
        rounds = [{k: v for k, v in json.loads(line).items() if k not in NOT_RESULTS} for line in lines]
        yield f"{out.name}/{directory.name} rounds", hashlib.sha256(json.dumps(rounds).encode()).hexdigest()


def kill_after_round_1(out: Path, *arguments: str | Path) -> None:
    """Start a run and kill it, with all it started, once it reports its first round."""
    with subprocess.Popen(
        command(out, *arguments), stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        next(line for line in process.stdout if "round 1/" in line)
        os.killpg(process.pid, signal.SIGKILL)


def command(out: Path, *arguments: str | Path) -> list[str]:
    """The command line of a run; the child uses no more than its settings say."""
    return [sys.executable, "-m", "zerofl.cli", "run", *map(str, arguments), "--out", str(out)]


if __name__ == "__main__":
    sys.exit(main())
