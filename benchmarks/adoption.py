"""Flower's quickstart shape with and without ZeroFL: accuracy and measured uplink bytes, in this process.

python benchmarks/adoption.py [--seeds N] [--rounds N] [--json FILE]            half a minute a run, two runs a seed
"""

import argparse
import importlib
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from shutil import copytree
from statistics import mean, stdev
from typing import Any, cast

import torch
from flwr.app import Context, Message, MetricRecord, RecordDict

from zerofl.flower.engines import RUN_ID, SERVER_NODE_ID, InProcessGrid
from zerofl.run.origin import origin

EXAMPLE = Path(__file__).parent.parent / "examples" / "quickstart-pytorch"
CLIENTS = 10
CONFIG: dict[str, Any] = {"num-server-rounds": 10, "fraction-train": 0.5, "local-epochs": 1, "lr": 0.02}


class CountingGrid(InProcessGrid):
    """Counts the bytes of all arrays that come up."""

    uplink_bytes = 0

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies, counted."""
        replies = super().pull_messages(message_ids)
        for reply in replies:
            if reply.has_content():
                records = reply.content.array_records.values()
                self.uplink_bytes += sum(len(array.data) for record in records for array in record.values())
        return replies


def run(adopted: bool, seed: int, rounds: int) -> dict[str, float]:
    """One run of the example, as it is or with its diff applied; the last round's accuracy and all uplink bytes."""
    with tempfile.TemporaryDirectory() as folder:
        app = copytree(EXAMPLE, Path(folder) / "app")
        if adopted:
            subprocess.run(["git", "apply", "zerofl.diff"], cwd=app, check=True)
        for name in [name for name in sys.modules if name.partition(".")[0] == "quickstart"]:
            del sys.modules[name]
        sys.path.insert(0, str(app))
        try:
            client, server = (importlib.import_module(f"quickstart.{side}_app") for side in ("client", "server"))
        finally:
            sys.path.remove(str(app))
        random.seed(seed)
        torch.manual_seed(seed)
        config = CONFIG | {"num-server-rounds": rounds}
        grid = CountingGrid(client.app, CLIENTS, config)
        context = Context(RUN_ID, SERVER_NODE_ID, {}, RecordDict(), config)
        server.app(grid, context)
        final = cast(MetricRecord, context.state["final"])
        return {"accuracy": float(cast(float, final["eval_acc"])), "uplink_bytes": grid.uplink_bytes}


def main() -> None:
    """Run both with several seeds and print their figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result: dict[str, Any] = {**origin(), "rounds": options.rounds}
    for name, adopted in (("unadopted", False), ("adopted", True)):
        runs = [run(adopted, seed, options.rounds) for seed in range(options.seeds)]
        accuracies = [r["accuracy"] for r in runs]
        spread = stdev(accuracies) if len(accuracies) > 1 else 0.0
        uplink_bytes = mean(r["uplink_bytes"] for r in runs)
        result[name] = {"accuracy": mean(accuracies), "deviation": spread, "uplink_bytes": uplink_bytes, "runs": runs}
        print(f"{name}: accuracy {mean(accuracies):.1%} ± {spread:.1%}, uplink {uplink_bytes / 1e6:.2f} MB")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
