"""How a run shows itself."""

import io
from typing import Any

import pytest

from tests.printing import Terminal, lines_of
from tests.running import round_record
from zerofl.experiment import Experiment
from zerofl.fl.records import RoundRecord
from zerofl.run.console import Output
from zerofl.run.progress import RunProgress, duration, opening
from zerofl.run.sweep import find_sweep, read_sweep


def record(round: int, **values: Any) -> RoundRecord:
    figures = {"uplink_bytes": 61_000_000, "downlink_bytes": 1_000_000, "test_accuracy": 0.5, "train_loss": 1.25}
    return round_record(round, **(figures | values))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What time it is, in seconds, to be set."""
    now = [0.0]
    monkeypatch.setattr("zerofl.run.progress.time.monotonic", lambda: now[0])
    return now


def shown(width: int, clock: list[float], seconds: float, done: int, rounds: int, clients: int) -> str:
    """The live line at the end, on a terminal of this width, after rounds and clients of the next one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(width))
        patch.setenv("TERM", "xterm")
        terminal = Terminal()
        with RunProgress(Output(terminal), "95-noniid-top-k-diff-0.2-seed3", rounds, []) as run:
            for round in range(1, done + 1):
                clock[0] += seconds
                run(record(round))
            if clients:
                run.replied(clients, 10)
        return next(line for line in reversed(lines_of(terminal)) if line.strip())


def test_a_round_shows_its_clients_and_what_is_left(clock: list[float]) -> None:
    """Three of 43 rounds of four minutes: forty are left, 2 h 40 min."""
    line = shown(120, clock, 240.0, done=3, rounds=43, clients=7)
    assert line.startswith(
        "round 4/43  client 7/10  about 2 h 40 min left  accuracy 50.0%  loss 1.250  uplink 183.0 MB  downlink 3.0 MB"
    )


@pytest.mark.parametrize("width", [40, 60, 80, 140])
def test_the_live_line_fits_and_keeps_what_matters(width: int, clock: list[float]) -> None:
    line = shown(width, clock, 3.0, done=123, rounds=700, clients=10)
    assert len(line) < width
    parts = line.split("  ")
    assert parts[:2] == ["round 124/700", "client 10/10"]
    assert width == 40 or parts[2] == "about 29 min left"  # 577 rounds of 3 s


def test_without_a_terminal_a_round_is_a_line_and_a_client_none(clock: list[float]) -> None:
    file = io.StringIO()
    with RunProgress(Output(file), "a", 3, [record(1)]) as run:
        run.replied(1, 2)
        clock[0] = 90.0
        run(record(2, test_accuracy=None, failures=[{"client": 4, "cause": "[no] reason"}]))
        run(record(3, train_loss=None))
    assert file.getvalue().splitlines() == [
        "a  round 2  client 4 failed: [no] reason",
        "a  round 2/3  accuracy 50.0%  loss 1.250  uplink 122.0 MB  downlink 2.0 MB  about 2 min left",
        "a  round 3/3  accuracy 50.0%  uplink 183.0 MB  downlink 3.0 MB",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "1 s"),
        (59, "59 s"),
        (59.5, "1 min"),
        (61, "2 min"),
        (3600, "1 h 0 min"),
        (9600, "2 h 40 min"),
        (86_400, "1 d 0 h"),
        (360_001, "4 d 5 h"),
    ],
)
def test_a_duration_is_rounded_up(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_run_says_what_it_will_take() -> None:
    """LEAF's CNN on 28x28 images of one channel, counted by hand."""
    parameters = (25 * 32 + 32) + (25 * 32 * 64 + 64) + (7 * 7 * 64 * 2048 + 2048) + (2048 * 10 + 10)
    vanilla, zerofl = read_sweep(find_sweep("demo")).experiments().values()
    assert opening(zerofl, 0) == (
        f"zerofl: 25 rounds, 5 of 50 clients a round; leaf_cnn with {parameters:,} parameters, sparsity 95%; "
        "uplink top_k_weights_diff, mask ratio 0, float32"
    )
    assert opening(vanilla, 12).startswith("vanilla-swat: 25 rounds from round 13 on, 5 of 50 clients a round; ")
    assert opening(vanilla, 12).endswith("sparsity 95%; uplink full, float32")
    one = Experiment(dataset="mnist5k", model="leaf_cnn", rounds=1, sparsity=0.975)
    assert opening(one, 0).startswith("run: 1 round, 10 of 100 clients a round; ")
    assert "sparsity 97.5%" in opening(one, 0)
