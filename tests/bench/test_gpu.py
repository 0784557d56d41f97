"""benchmarks/gpu.py, tried on a CPU: every part runs, it resumes, and what it leaves is what the report reads."""

import io
import json
import runpy
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from zerofl.cli import main
from zerofl.data import load_dataset

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
TINY = ["width=4", "clients=5", "clients_per_round=3", "rounds=2", "batch_size=16", "evaluate_every=1"]


def play(root: Path, out: Path, minutes: float, monkeypatch: pytest.MonkeyPatch, breaking: str = "") -> None:
    script = runpy.run_path(str(SCRIPT))
    of_main = script["main"].__globals__
    of_main["tests"] = lambda: "they are running"  # and would run this one
    of_main["ROWS"] = script["ROWS"][:2]
    if breaking:
        of_main[breaking] = lambda *_: 1 / 0
    settings = [f"--set={setting}" for setting in TINY]
    arguments = [f"--root={root}", f"--out={out}", f"--minutes={minutes}", "--device=cpu", *settings]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
    assert script["main"]() == (1 if breaking else 0)


def test_all_parts_run_and_it_resumes(
    cifar_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    play(cifar_root, out, 0.0, monkeypatch, "selection")  # time for the first parts alone, of which one fails
    first = json.loads((out / "gpu.json").read_text())
    assert first["rows"] == {}
    assert "selection_ms" not in first
    assert "failed: selection_ms: ZeroDivisionError" in capsys.readouterr().out
    assert set(first["step_ms"]) >= {f"{k}, {p}" for k in ("sparse", "dense") for p in ("float32", "tf32", "bfloat16")}
    assert 0 <= first["round_sparse"]["not_training_seconds"] < first["round_sparse"]["seconds"]
    assert 0 < first["gradient_error"]["float32"]["median"] < 1e-4
    assert set(first["coding_seconds"]) == {f"{w}, {n} threads" for w in ("encode", "decode") for n in (1, 2, 4, 10)}

    play(cifar_root, out, 10.0, monkeypatch)
    figures: dict[str, Any] = json.loads((out / "gpu.json").read_text())
    printed = capsys.readouterr().out
    assert "step_ms" not in printed  # it was measured before
    assert {key: figures[key] for key in first if key != "rows"} == {k: v for k, v in first.items() if k != "rows"}
    assert {name: row["finished"] for name, row in figures["rows"].items()} == {
        "recommended-seed1": True,
        "95-niid-top-k-0.2-seed1": True,
    }
    assert "95-niid-top-k-0.2-seed1" in printed
    assert "75.54" in printed  # the paper's
    assert sorted(path.name for path in out.iterdir()) == ["gpu.json", "table1-cifar10.zip"]
    assert main(["report", str(out / "table1-cifar10.zip"), "--out", str(tmp_path / "page.html")]) == 0
    assert "recommended" in (tmp_path / "page.md").read_text()

    # On another machine, with the archive alone, nothing that is finished is run again, and what is not begins anew.
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("gpu.json", "table1-cifar10.zip"):
        (alone / name).write_bytes((out / name).read_bytes())
    with zipfile.ZipFile(alone / "table1-cifar10.zip", "a") as packed:
        packed.writestr("95-niid-diff-0.1-seed1/rounds.jsonl", "{}")
    capsys.readouterr()
    play(cifar_root, alone, 10.0, monkeypatch)
    assert not list((tmp_path / "alone-work").rglob("model.safetensors"))
    assert not (tmp_path / "alone-work" / "runs" / "95-niid-diff-0.1-seed1").exists()
    assert not [path for folder in (out, alone) for path in folder.iterdir() if path.suffix == ".part"]


@pytest.mark.parametrize("as_zip", [False, True])
def test_packed_sheets_are_batches(as_zip: bool, tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    images = {
        part: generator.integers(0, 255, (count, 32, 32, 3), np.uint8)
        for part, count in (("train", 5000), ("test", 1000))
    }
    labels = {part: generator.integers(0, 10, len(x)).astype(np.uint8) for part, x in images.items()}
    root = tmp_path / "packed"
    root.mkdir()
    for part, x in images.items():
        files = {f"{part}_labels.npy": io.BytesIO()}
        np.save(files[f"{part}_labels.npy"], labels[part])
        for number, sheet in enumerate(np.split(x, len(x) // 1000)):
            pixels = sheet.reshape(25, 40, 32, 32, 3).transpose(0, 2, 1, 3, 4).reshape(800, 1280, 3)
            Image.fromarray(pixels).save(
                files.setdefault(f"{part}_{number:02}.webp", io.BytesIO()), "webp", lossless=True
            )
        if as_zip:
            with zipfile.ZipFile(root / f"cifar10_{part}.zip", "w") as packed:
                for name, data in files.items():
                    packed.writestr(f"cifar10/{name}", data.getvalue())
        else:
            for name, data in files.items():
                (root / name).write_bytes(data.getvalue())
    work = tmp_path / "work"
    work.mkdir()
    dataset = load_dataset("cifar10", str(runpy.run_path(str(SCRIPT))["unpacked"](root, work)))
    for part, split in (("train", dataset.train), ("test", dataset.test)):
        assert np.array_equal(split.images.numpy(), images[part].transpose(0, 3, 1, 2))
        assert np.array_equal(split.labels.numpy(), labels[part])
