"""`zerofl evaluate`: a run's final model, with its top-k weights and with all of them."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zerofl.run.console import Output


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    evaluate = commands.add_parser(
        "evaluate",
        help="a run's final model, with its top-k weights and with all of them",
        description="Evaluate the final model of a run on the test part, sparse as it was trained and dense (§4.3).",
    )
    evaluate.add_argument("directory", metavar="RUN_DIR", type=Path, help="for example runs/demo/zerofl")
    evaluate.add_argument("--root", metavar="DIR", help="where the data set is (default: where the run found it)")
    evaluate.set_defaults(command=_evaluate)


def _evaluate(options: argparse.Namespace, console: "Output", errors: "Output") -> int:
    from zerofl.run.evaluate import evaluate_run

    found = evaluate_run(options.directory, options.root)
    console.print(f"with the top-k weights: accuracy {found.sparse_accuracy:.2%}, test loss {found.sparse_loss:.4g}")
    console.print(f"with all weights: accuracy {found.dense_accuracy:.2%}, test loss {found.dense_loss:.4g}")
    if found.other_data:
        console.print("note: the data are not those of the run, so its own figures are others")
    return 0
