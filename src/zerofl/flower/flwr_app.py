"""The ServerApp of `flwr run`, in a simulation or a deployment: the run config is the experiment."""

import sys
from pathlib import Path

from flwr.app import Context, UserConfig
from flwr.serverapp import Grid, ServerApp

from zerofl.data import load_dataset
from zerofl.experiment import Experiment, ExperimentError, make_experiment
from zerofl.fl.train import check_fits
from zerofl.flower.server_app import serve
from zerofl.run.console import Output
from zerofl.run.folder import ROUNDS, ResultsError, check_run, is_finished, locked, open_run, read_lines
from zerofl.run.preflight import check_room
from zerofl.run.progress import RunProgress, opening

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

    def note(line: str) -> None:
        console.print(f"{experiment.name}: {line}")

    check_fits(experiment, load_dataset(experiment.dataset, experiment.root))
    check_room(out, [] if is_finished(directory) else [experiment])
    with locked(directory):
        try:
            experiment = check_run(directory, experiment, resume)
        except ResultsError as error:
            raise ResultsError(f"{error} (in the run config: resume=true, or another out or name)") from error
        if is_finished(directory):
            console.print(f"{experiment.name}: finished before, in {directory}")
            return
        checkpoint = open_run(directory, experiment, note)
        console.print_prose(opening(experiment, checkpoint.round if checkpoint else 0))
        with RunProgress(console, experiment.name, experiment.rounds, read_lines(directory / ROUNDS)) as progress:
            serve(grid, experiment, directory, checkpoint, progress)
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
