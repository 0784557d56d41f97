import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.running import client_record
from zerofl.bench import uplink
from zerofl.cli import main
from zerofl.exchange.update import Update, sparsified
from zerofl.fl.client import Trained
from zerofl.fl.records import ClientRecord
from zerofl.fl.server import ServerState


def test_ten_updates_are_averaged_in_less_than_three_models_of_memory() -> None:
    """Of the size at which a model outweighs the interpreter's own: 40 MB, of which 30 % are sent."""
    generator = torch.Generator().manual_seed(0)
    received = {f"w{i}": torch.randn(1000, 1000, generator=generator) for i in range(10)}
    sent = {name: torch.where(torch.rand(w.shape, generator=generator) < 0.3, w, 0.0) for name, w in received.items()}
    figures = uplink.measure_aggregation(received, Update(False, {name: sparsified(w) for name, w in sent.items()}))
    if figures["peak_models"] is None:
        pytest.skip("this system does not tell a process's peak memory")
    assert 1 < figures["peak_models"] < 3


def test_bench_uplink_writes_a_row_for_each_combination(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The figures of a small stand-in for the update; the command itself trains a ResNet-18."""
    generator = torch.Generator().manual_seed(0)  # two entries at the threshold would both be sent

    def state(n: int) -> dict[str, torch.Tensor]:
        w, b = (torch.randn(shape, generator=generator) for shape in ((300, 100), (100,)))
        return {"w": w, "b": b, "n": torch.tensor(n)}

    received, trained = state(1), state(2)
    record = client_record(1, 0, 30)
    monkeypatch.setattr(uplink, "initial_state", lambda experiment, dataset: ServerState(received, {}))
    monkeypatch.setattr(uplink, "train_locally", lambda *_, round, client: Trained(trained, ["w"], record))
    began = []

    def train_client(*arguments: Any) -> tuple[Update, ClientRecord]:
        began.append(arguments[3:])
        return Update(False, dict(received)), record

    monkeypatch.setattr(uplink, "train_client", train_client)
    assert main(["bench", "uplink", "--rounds", "2", "--json", str(tmp_path / "uplink.json")]) == 0
    assert began == 2 * [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert "top_k_weights_diff" in capsys.readouterr().out
    rows = json.loads((tmp_path / "uplink.json").read_text())["rows"]
    assert len(rows) == 2 * 3 * 3 * 4
    for row in rows:
        assert row.keys() >= {
            "sparsity", "mask_ratio", "values", "bytes", "index_bytes", "value_bytes", "dense_bytes", "entropy_bytes",
            "csr_bytes", "paper_bytes", "encode_seconds", "decode_seconds", "received_bytes", "received_index_bytes",
            "received_encode_seconds", "received_decode_seconds",
        }  # fmt: skip
        sent = round((1 - row["sparsity"] + row["mask_ratio"]) * 30_000)
        assert row["dense_bytes"] == 4 * 30_100 + 8
        assert row["csr_bytes"] == 13 + (1 + 4 + 4 * sent + 1 + 4 * sent) + (2 + 400) + (2 + 8)
        assert row["paper_bytes"] == 8 * (sent + 100)
        assert row["bytes"] == row["index_bytes"] + row["value_bytes"]
        assert row["entropy_bytes"] < row["index_bytes"] < 1.05 * row["entropy_bytes"]
        assert row["bytes"] < row["csr_bytes"]
        assert row["received_bytes"] <= row["bytes"] + 4


@pytest.mark.parametrize("command", ["uplink", "step", "layers"])
def test_where_no_file_can_be_written_is_said_before_minutes_of_work(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", command, "--json", str(tmp_path / "missing" / "x.json")]) == 2
    assert f"{tmp_path / 'missing'} is no folder that can be written" in capsys.readouterr().err
    assert main(["bench", command, "--json", str(tmp_path)]) == 2
    assert f"--json {tmp_path}: it is a folder; name a file" in capsys.readouterr().err
