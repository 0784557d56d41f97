"""The command line: `zerofl run`, `report`, `evaluate`, `data` and `bench`, a file for each."""

import argparse
import contextlib
import logging
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from zerofl.cli import bench, data, evaluate, report, run
from zerofl.cli.importing import INTERRUPTED, importing, say_interrupted

if TYPE_CHECKING:
    from zerofl.run.console import Output

# All but the standard library is imported where it is used: PyTorch takes seconds, `zerofl --help` does without, and an
# interrupt finds `main` ready for it.


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    0 is done; 1 a run failed, or the data set is not the complete published one; 2 it could not be started, or the data
    set not be read; 130 or 143 it was interrupted, by Ctrl-C or by SIGTERM.
    """
    try:
        with importing():
            from zerofl.run.console import Output

            console, errors = Output(sys.stdout), Output(sys.stderr)
        try:
            given = sys.argv[1:] if arguments is None else list(arguments)
            options = _parser().parse_args(given)
            options.given = given
            return _command(options, console, errors)
        finally:
            console.file.flush()  # what argparse prints may have no reader
    except KeyboardInterrupt:
        say_interrupted()
        return INTERRUPTED


def _command(options: argparse.Namespace, console: "Output", errors: "Output") -> int:
    if "torch" not in sys.modules:
        errors.print("loading PyTorch ...")
    with importing():
        import torch  # noqa: F401 (every command needs it)
    from zerofl.errors import ZeroFLError

    try:
        with _printing("zerofl.data", errors):
            status: int = options.command(options, console, errors)
    except (ZeroFLError, OSError) as error:
        errors.print(f"zerofl: {error}")
        return 2
    return status


@contextlib.contextmanager
def _printing(name: str, output: "Output") -> Iterator[None]:
    """Print what the logger `name` has to say; afterwards it is as the program that called `main` had it."""
    logger, lines = logging.getLogger(name), logging.StreamHandler(output.file)
    level = logger.level
    logger.addHandler(lines)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(lines)


def _parser() -> argparse.ArgumentParser:
    from zerofl import __version__

    parser = argparse.ArgumentParser(prog="zerofl", description="Federated learning with sparse training and uplinks.")
    parser.add_argument("--version", action="version", version=f"zerofl {__version__}")
    commands = parser.add_subparsers(title="commands", required=True)
    for command in (run, report, evaluate, bench, data):
        command.add(commands)
    return parser
