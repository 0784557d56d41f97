import json
from pathlib import Path
from typing import Any

import pytest
import torch

from zerofl.bench import step
from zerofl.cli import main
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


def test_a_wrong_kernel_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernels.conv2d

    def wrong(*arguments: Any) -> Any:
        output, *rest = right(*arguments)
        return output * 1.001, *rest

    monkeypatch.setattr(step, "_in_own_process", lambda isa, function, *arguments: function(*arguments))
    monkeypatch.setattr(kernels, "conv2d", wrong)
    with pytest.raises(step.BenchError, match="deviates from the reference"):
        step.bench_step("leaf_cnn", 2, [0.9], torch.get_num_threads(), None, note=lambda _: None)


@pytest.mark.parametrize("option", [["--sparsity", "1"], ["--batch-size", "0"], ["--threads", "x"], ["--isa", "z80"]])
def test_bench_refuses_nonsense(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "step", *option])
    assert option[1] in capsys.readouterr().err
