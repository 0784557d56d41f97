"""benchmarks/check.py: it passes what is as fast as on record, and fails, with names, where a kernel is slower."""

import json
import runpy
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from zerofl.run.origin import origin
from zerofl.sparse import dispatch, kernels

pytestmark = pytest.mark.skipif(
    dispatch.UNAVAILABLE is not None, reason="zerofl is installed without its native kernels"
)
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "check.py"
CODING = {f"{way}, mask ratio {ratio}" for ratio in ("0", "0.2") for way in ("encode", "decode")}


@pytest.fixture
def script() -> Iterator[dict[str, Any]]:
    """The script, measuring in this process and with little repetition."""
    threads = torch.get_num_threads()
    of_main: dict[str, Any] = runpy.run_path(str(SCRIPT))["main"].__globals__
    of_main |= {
        "in_own_process": lambda function, *arguments: function(*arguments),
        "SECONDS": 0,
        "LEAST_PAIRS": 3,
        "FLOATS": bytes(range(256)) * 4000,
    }
    yield of_main
    torch.set_num_threads(threads)


def play(script: dict[str, Any], record: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    monkeypatch.setattr(sys, "argv", ["check.py", "--record", str(record), *options])
    status: int = script["main"]()
    return status


def on_record(path: Path, factor: float) -> None:
    """Put the record's ratios at `factor` of what they are."""
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"ratios": {name: factor * r for name, r in record["ratios"].items()}}))


def test_a_slowed_kernel_makes_it_fail(
    script: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "check.json"
    script["MEASURES"] = (partial(script["steps"], "leaf_cnn", 4),)
    assert play(script, record, monkeypatch, "--write") == 0
    found = json.loads(record.read_text())
    assert found["isa"] == dispatch.isa()
    assert found["ratios"].keys() == {"step of leaf_cnn"}
    assert capsys.readouterr().err.count("measured: step of leaf_cnn") == 3
    on_record(record, 0.5)  # whatever else this machine does, it is not half as fast by it
    assert play(script, record, monkeypatch) == 0
    assert "as fast as on record" in capsys.readouterr().out
    on_record(record, 2.0)

    right = kernels.conv2d

    def slowed(*arguments: Any) -> Any:
        for _ in range(30):
            right(*arguments)
        return right(*arguments)

    monkeypatch.setattr(kernels, "conv2d", slowed)
    assert play(script, record, monkeypatch) == 1
    assert "the three worst: step of leaf_cnn" in capsys.readouterr().out


def test_every_measure_measures(script: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the codec and a round; the steps are above, and the one of ResNet-18 is the same on another model."""
    assert [of.args for of in script["MEASURES"][:2]] == [("resnet18", 8), ("leaf_cnn", 20)]
    script |= {"LEAST_PAIRS": 1}
    ratios = {name: ratio for measure in script["MEASURES"][2:] for name, ratio in measure().items()}
    assert ratios.keys() == {"overhead of a round", *CODING}
    assert all(ratio > 0 for ratio in ratios.values())


def test_more_than_15_percent_is_too_much_and_the_three_worst_are_named(
    script: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    record = {"machine": origin()["machine"], "ratios": dict.fromkeys("abcde", 2.0)}
    assert script["verdict"](record, dict.fromkeys("abcde", 1.71)) == 0  # 14.5 % less
    assert "faster" not in capsys.readouterr().out
    now = {"a": 2.5, "b": 1.69, "c": 1.9, "d": 1.0, "f": 9.0}  # 15.5 % and 50 % less; e is gone
    assert script["verdict"](record, now) == 1
    out = capsys.readouterr().out
    assert out.splitlines()[-1].endswith("the three worst: e, d, b")
    assert "a drop back would not be seen: a;" in out
    assert script["verdict"](record | {"machine": "another"}, now) == 0
    assert "no verdict: the record is of another machine, another; this is" in capsys.readouterr().out


def test_what_seems_slower_is_measured_twice_more_and_the_middle_counts(script: dict[str, Any]) -> None:
    shown = {"calm": [2.0], "busy": [1.0, 1.9, 1.8], "slower": [1.6, 1.2, 1.9]}
    script["MEASURES"] = tuple(partial(lambda name: {name: shown[name].pop(0)}, name) for name in shown)
    assert script["check"](dict.fromkeys(shown, 2.0)) == {"calm": 2.0, "busy": 1.8, "slower": 1.6}
    assert not any(shown.values())  # each as often as that


def test_a_record_of_other_instructions_or_none_is_refused(
    script: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert play(script, tmp_path / "none.json", monkeypatch) == 1
    assert "--write" in capsys.readouterr().out
    (tmp_path / "other.json").write_text(json.dumps({"isa": "z80", "ratios": {}}))
    assert play(script, tmp_path / "other.json", monkeypatch) == 1
    assert "is of z80" in capsys.readouterr().out


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_the_records_have_what_is_measured(isa: str) -> None:
    record = json.loads((SCRIPT.parent / "results" / f"check-{isa}.json").read_text())
    assert record["isa"] == isa
    assert set(record["ratios"]) == {"step of resnet18", "step of leaf_cnn", "overhead of a round", *CODING}
    assert all(ratio > 0 for ratio in record["ratios"].values())
