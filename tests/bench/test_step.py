import json
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from zerofl.bench import step
from zerofl.cli import main
from zerofl.fl import energy
from zerofl.sparse import dispatch, kernels

pytestmark = pytest.mark.skipif(
    dispatch.UNAVAILABLE is not None, reason="zerofl is installed without its native kernels"
)


@pytest.mark.parametrize("command", ["step", "layers"])
def test_bench_writes_a_row_for_each_sparsity(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a small batch, in this process and without repetitions; the command itself starts processes of its own."""
    monkeypatch.setattr(step, "_in_own_process", lambda isa, function, *arguments: function(*arguments))
    monkeypatch.setattr(step, "SECONDS", 0)
    monkeypatch.setattr(step, "LEAST_ROUNDS", 1)
    monkeypatch.setattr(step, "ENERGY_SECONDS", 0)
    threads = torch.get_num_threads()
    options = ["--model", "leaf_cnn", "--batch-size", "2", "--sparsity", "0.9", "0.95", "--threads", str(threads)]
    assert main(["bench", command, *options, "--json", str(tmp_path / "step.json")]) == 0
    assert f"leaf_cnn, batch 2, {threads} threads" in capsys.readouterr().out
    result = json.loads((tmp_path / "step.json").read_text())
    assert (result["model"], result["batch_size"], result["threads"]) == ("leaf_cnn", 2, threads)
    layers = [None] if command == "step" else ["conv1", "conv2", "fc1"]
    assert [(row.get("layers", [None])[0], row["sparsity"]) for row in result["rows"]] == [
        (layer, sparsity) for layer in layers for sparsity in (0.9, 0.95)
    ]
    for row in result["rows"]:
        assert row["speedup"] == pytest.approx(row["dense_seconds"] / row["sparse_seconds"])
        assert row["breakdown"].keys() == {*dispatch.native.seconds(), "optimiser", "other"}
        assert all(row["breakdown"][part] > 0 for part in ("top_k", "packing", "forward", "grad_weight"))
        assert max(row["output_error"], row["gradient_error"]) < step.TOLERANCE


def test_the_energy_of_a_step_is_measured_or_estimated_and_says_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where every reading finds 1 J more and the whole machine as busy as this process, a step takes 1 J."""
    monkeypatch.setattr(step, "_in_own_process", lambda isa, function, *arguments: function(*arguments))
    monkeypatch.setattr(step, "SECONDS", 0)
    monkeypatch.setattr(step, "LEAST_ROUNDS", 1)
    monkeypatch.setattr(step, "ENERGY_SECONDS", 0)
    numbers = count(1)

    def read() -> energy.Reading:
        number = next(numbers)
        return energy.Reading(
            (energy.Counter("package-0", number * 10**6, 10**12),), time.process_time(), float(number)
        )

    options = ["--model", "leaf_cnn", "--batch-size", "2", "--sparsity", "0.9", "--json", str(tmp_path / "step.json")]
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    for reading, watts in ((energy.read, []), (energy.read, ["--watts-per-core", "4"]), (read, [])):
        monkeypatch.setattr(energy, "read", reading)
        assert main(["bench", "step", *options, *watts]) == 0
        printed = capsys.readouterr().out
        (row,) = json.loads((tmp_path / "step.json").read_text())["rows"]
        for kind in ("dense", "sparse"):
            measured, estimate = row[f"{kind}_joules"], row[f"{kind}_joules_estimate"]
            assert measured == (None if reading is not read else pytest.approx(1.0, rel=0.2))
            assert (estimate is not None) == bool(watts)
            if estimate:  # 4 W of one thread's time at least, and of no more than all of them
                assert 0 < estimate < 4 * 100 * row[f"{kind}_seconds"] * torch.get_num_threads()
            assert (f"{kind} J (estimate)" in printed) == bool(watts)
        assert ("dense J  sparse J  " in printed) == (reading is read)
        assert ("energy: not measured: " in printed) == (reading is not read and not watts)


@pytest.mark.parametrize("of", ["outputs", "gradients"])
def test_a_wrong_kernel_is_not_timed(of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernels.conv2d

    def wrong(*arguments: Any) -> Any:
        output, *rest = right(*arguments)
        if of == "outputs":
            return output * 1.001, *rest
        if output.requires_grad and output.shape[1] == 64:  # not those of the first layer
            hook: Callable[[torch.Tensor], torch.Tensor] = lambda gradient: gradient * torch.nan  # noqa: E731
            output.register_hook(hook)  # type: ignore[no-untyped-call]
        return output, *rest

    monkeypatch.setattr(step, "_in_own_process", lambda isa, function, *arguments: function(*arguments))
    monkeypatch.setattr(kernels, "conv2d", wrong)
    with pytest.raises(step.BenchError, match="deviates from the reference"):
        step.bench_step("leaf_cnn", 2, [0.9], torch.get_num_threads(), None, note=lambda _: None)


@pytest.mark.parametrize(
    "option",
    [["--sparsity", "1"], ["--batch-size", "0"], ["--threads", "x"], ["--isa", "z80"], ["--watts-per-core", "0"]],
)
def test_bench_refuses_nonsense(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "step", *option])
    assert option[1] in capsys.readouterr().err
