"""Flower's quickstart shape with and without ZeroFL: accuracy and measured bytes both ways, in this process.

python benchmarks/adoption.py [--seeds N] [--rounds N] [--json FILE]            half a minute a run, three runs a seed
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

VARIANTS = (("unadopted", False, None), ("adopted", True, None), ("adopted, int8 down", True, "int8"))


class CountingGrid(InProcessGrid):
    """Counts the bytes of all arrays that go down and come up."""

    uplink_bytes = downlink_bytes = 0

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """The messages, counted."""
        messages = list(messages)
        self.downlink_bytes += sum(map(array_bytes, messages))
        return super().push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies, counted."""
        replies = super().pull_messages(message_ids)
        self.uplink_bytes += sum(array_bytes(reply) for reply in replies if reply.has_content())
        return replies


def array_bytes(message: Message) -> int:
    """The bytes of all arrays in a message."""
    return sum(len(array.data) for record in message.content.array_records.values() for array in record.values())


def run(adopted: bool, downlink_values: str | None, seed: int, rounds: int) -> dict[str, float]:
    """One run of the example, as it is or with its diff applied; the last round's accuracy and all bytes of arrays."""
    with tempfile.TemporaryDirectory() as folder:
        app = copytree(EXAMPLE, Path(folder) / "app")
        if adopted:
            subprocess.run(["git", "apply", "zerofl.diff"], cwd=app, check=True)
            server_app = app / "quickstart" / "server_app.py"
            text = server_app.read_text(encoding="utf-8")
            assert '"fraction-train"]))\n' in text
            packed = text.replace(
                '"fraction-train"]))\n', f'"fraction-train"]), downlink_values={downlink_values!r})\n'
            )
            server_app.write_text(packed, encoding="utf-8")
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
        accuracy = float(cast(float, final["eval_acc"]))
        return {"accuracy": accuracy, "uplink_bytes": grid.uplink_bytes, "downlink_bytes": grid.downlink_bytes}


def main() -> None:
    """Run all with several seeds and print their figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result: dict[str, Any] = {**origin(), "rounds": options.rounds}
    for name, adopted, downlink_values in VARIANTS:
        runs = [run(adopted, downlink_values, seed, options.rounds) for seed in range(options.seeds)]
        accuracies = [r["accuracy"] for r in runs]
        spread = stdev(accuracies) if len(accuracies) > 1 else 0.0
        up, down = (mean(r[key] for r in runs) for key in ("uplink_bytes", "downlink_bytes"))
        result[name] = {"accuracy": mean(accuracies), "deviation": spread, "uplink_bytes": up, "downlink_bytes": down}
        result[name]["runs"] = runs
        print(f"{name}: accuracy {mean(accuracies):.1%} ± {spread:.1%}, {up / 1e6:.2f} MB up, {down / 1e6:.2f} MB down")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
