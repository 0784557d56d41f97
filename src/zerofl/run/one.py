"""One run from its settings to its summary, whoever carries the messages: `zerofl run` and `flwr run` both are this."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

from zerofl.experiment import Experiment
from zerofl.fl.records import RoundRecord
from zerofl.run.checkpoint import Checkpoint
from zerofl.run.console import Output
from zerofl.run.files import CHECKPOINT
from zerofl.run.folder import is_finished, read_rounds
from zerofl.run.progress import RunProgress, opening
from zerofl.run.resume import check_run, locked, open_run
from zerofl.run.rounds import OnRound
from zerofl.run.tensorboard import RoundEvents

OnReply = Callable[[int, int], None]
"""(replies, clients): so many of the clients that were asked have replied."""


class Rounds(Protocol):
    """Runs an experiment's rounds in its folder, on from a checkpoint, and reports each round and each reply."""

    def __call__(
        self,
        experiment: Experiment,
        directory: Path,
        checkpoint: Checkpoint | None,
        on_round: OnRound,
        on_reply: OnReply,
    ) -> None: ...


def run_one(
    directory: Path, experiment: Experiment, resume: bool, rounds: Rounds, console: Output, tensorboard: bool = False
) -> bool:
    """Run an experiment in its folder, or resume it there, and show how it does; False if it was finished before.

    Raises:
        ResultsError: another process has the folder, or as `check_run` and `open_run`; and what `rounds` raises.
    """
    with locked(directory):
        experiment = check_run(directory, experiment, resume)  # again: another process may have been here
        if is_finished(directory):
            (directory / CHECKPOINT).unlink(missing_ok=True)  # of a process that was killed after its summary
            console.print(f"{experiment.name}: finished before, in {directory}")
            return False
        checkpoint = open_run(directory, experiment, lambda line: console.print(f"{experiment.name}: {line}"))
        earlier = read_rounds(directory)
        console.print_prose(opening(experiment, len(earlier)))
        with ExitStack() as shown:
            progress = shown.enter_context(RunProgress(console, experiment.name, experiment.rounds, earlier))
            watchers: list[OnRound] = [progress]
            if tensorboard:
                watchers.append(shown.enter_context(RoundEvents(directory, len(earlier) + 1)))

            def on_round(record: RoundRecord) -> None:
                for watcher in watchers:
                    watcher(record)

            rounds(experiment, directory, checkpoint, on_round, progress.replied)
    return True
