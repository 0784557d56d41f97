"""The ServerApp of `flwr run`, in a simulation or a deployment: the run config is the experiment."""

import sys
from pathlib import Path

from flwr.app import Context, UserConfig
from flwr.serverapp import Grid, ServerApp

from zerofl.experiment import Experiment, ExperimentError, make_experiment
from zerofl.flower.server_app import serve
from zerofl.run.checkpoint import Checkpoint
from zerofl.run.console import Output
from zerofl.run.files import ResultsError
from zerofl.run.one import OnReply, run_one
from zerofl.run.preflight import preflight
from zerofl.run.rounds import OnRound

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the experiment of the run config into a folder of its name below `out`; `flwr log` shows the rounds.

    Raises:
        ExperimentError: an unknown key or a value that cannot be used; it names them.
        DatasetError: the data set is not there.
        ResultsError: the folder cannot be written or its disk is too full; it holds a run already, and `resume` is not
            set or it is another one.
        RoundError: too few nodes, or too few usable updates in a round.
    """
    experiment, out, resume = read_run_config(context.run_config)
    directory, console = out / experiment.name, Output(sys.stdout)

    def rounds(
        experiment: Experiment, directory: Path, checkpoint: Checkpoint | None, on_round: OnRound, on_reply: OnReply
    ) -> None:
        serve(grid, experiment, directory, checkpoint, on_round)

    try:
        (experiment,) = preflight(out, [experiment], resume)
    except ResultsError as error:
        hint = " (in the run config: resume=true, or another out or name)" if "--out" in str(error) else ""
        raise ResultsError(f"{error}{hint}") from error
    if run_one(directory, experiment, resume, rounds, console):
        console.print(f"{experiment.name}: finished, in {directory}")


def read_run_config(run_config: UserConfig) -> tuple[Experiment, Path, bool]:
    """The experiment, the folder for results, and whether to resume: `out` and `resume` beside the experiment's keys.

    Raises:
        ExperimentError: an unknown key, a value that cannot be used, or an `out` that is relative.
    """
    values = dict(run_config)
    out, resume = values.pop("out", ""), values.pop("resume", False)
    if not isinstance(out, str) or not (folder := Path(out).expanduser()).is_absolute():
        raise ExperimentError(
            f"out = {out!r}: expected an absolute path, because the SuperLink works in a folder of its own; for "
            "example -c 'out=\"/data/runs\"'"
        )
    if not isinstance(resume, bool):
        raise ExperimentError(f"resume = {resume!r}: expected true or false")
    return make_experiment(values), folder, resume
