"""What a report makes of runs that are unfinished, damaged or not there."""

import json
import math
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes

from tests.report.sweeps import LAYERS, accuracy, cells, write_sweep
from tests.running import round_record
from zerofl.cli import main
from zerofl.report.cells import Beside
from zerofl.report.collect import collect
from zerofl.report.figures import accuracy as accuracy_figure
from zerofl.report.figures import figures
from zerofl.report.page import write_report
from zerofl.report.tables import paper_table, persistence_table, row_table
from zerofl.run.checkpoint import save_snapshot
from zerofl.run.files import ResultsError


def test_a_row_that_is_not_finished_is_shown_as_far_as_it_has_come(tmp_path: Path) -> None:
    collection = collect(write_sweep(tmp_path / "sweep", unfinished="top-k"))
    line = cells(row_table(collection), "top-k")
    far = "seed 1: round 2 of 4, seed 2: round 2 of 4"
    assert (line["Seeds finished"], line["Not finished"], line["Final accuracy %"]) == ("0 of 2", far, "")
    table = paper_table(collection)
    assert table is not None
    assert table.rows[2][5] == Beside("round 2 of 4", "73.65")
    headings = [figure.heading for figure in figures(collection)]
    assert {"Accuracy", "Loss", "Figures 3, 5 and 6: where the weights are, top-k"} <= set(headings)


def test_what_is_not_a_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ResultsError, match="holds no run with a finished round"):
        collect(tmp_path)
    assert main(["report", str(tmp_path / "nowhere"), "--out", str(tmp_path / "r.html")]) == 2
    assert "nowhere holds no run" in capsys.readouterr().err
    assert not (tmp_path / "r.html").exists()


def test_a_file_among_the_folders_is_left_out_and_said(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a shell's * gives them."""
    readme = tmp_path / "README.md"
    readme.write_text("of the runs")
    assert main(["report", str(readme), str(sweep), "--out", str(tmp_path / "r.html")]) == 0
    told = f"zerofl: {readme} is a file, not the folder of a run or of runs: it is left out\n"
    assert capsys.readouterr().err == told
    assert (tmp_path / "r.html").exists()
    assert main(["report", str(readme), "--out", str(tmp_path / "other.html")]) == 2
    assert capsys.readouterr().err.startswith(f"{told}zerofl: there is no folder to report on")


def test_an_archive_of_runs_is_a_folder_of_runs(sweep: Path, tmp_path: Path) -> None:
    packed = shutil.make_archive(str(tmp_path / sweep.name), "zip", sweep)
    for given, page in ((str(sweep), "folder.html"), (packed, "archive.html")):
        assert main(["report", given, "--out", str(tmp_path / page)]) == 0
    assert (tmp_path / "archive.csv").read_text() == (tmp_path / "folder.csv").read_text()
    # As a file manager packs it, with the folder itself in it.
    packed = shutil.make_archive(str(tmp_path / "whole"), "zip", sweep.parent, sweep.name)
    assert main(["report", packed, "--out", str(tmp_path / "whole.html")]) == 0
    assert (tmp_path / "whole.csv").read_text() == (tmp_path / "folder.csv").read_text()


def test_an_archive_that_is_damaged_or_has_no_run_is_named(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = tmp_path / "damaged.zip"
    with zipfile.ZipFile(packed, "w") as archive:  # as it is, not compressed
        archive.write(sweep / "sweep.toml", "sweep.toml")
    packed.write_bytes(packed.read_bytes().replace(b"rounds = 4", b"rounds = 5"))
    (tmp_path / "none").mkdir()
    empty = shutil.make_archive(str(tmp_path / "empty"), "zip", tmp_path / "none")
    given_and_words = [(packed, "cannot be unpacked: "), (empty, "holds no run")]
    for kind in (zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2):
        packed = tmp_path / f"damaged{kind}.zip"
        with zipfile.ZipFile(packed, "w", kind) as archive:
            archive.write(sweep / "sweep.toml", "sweep.toml")
        content = bytearray(packed.read_bytes())
        content[60:80] = bytes(20)
        packed.write_bytes(content)
        given_and_words.append((packed, "cannot be unpacked: "))
    packed = tmp_path / "name.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("\xfc", "")
    packed.write_bytes(packed.read_bytes().replace("\xfc".encode(), b"\xff\xff"))
    given_and_words.append((packed, "cannot be unpacked: "))
    (sweep / "sweep.toml").write_text("no = TOML = file")
    packed = Path(shutil.make_archive(str(tmp_path / "sweep"), "zip", sweep))
    given_and_words.append((packed, f"{packed}/sweep/sweep.toml: not valid TOML"))
    for given, words in given_and_words:
        assert main(["report", str(given), "--out", str(tmp_path / "r.html")]) == 2
        told = capsys.readouterr().err
        assert told.startswith(f"zerofl: {given}")
        assert words in told


def test_a_byte_order_mark_is_read_over(sweep: Path) -> None:
    """As an editor may put it before a file, of which it changed a comment."""
    before = collect(sweep)
    for file in (sweep / "sweep.toml", *sweep.glob("*/experiment.toml")):
        file.write_text(file.read_text(encoding="utf-8"), encoding="utf-8-sig")
    assert collect(sweep) == before


def test_every_row_and_seed_of_the_file_is_there(sweep: Path) -> None:
    """One that was not run, one of whose seeds one was, and one whose second seed has two rounds."""
    shutil.rmtree(sweep / "swat-seed2")
    (sweep / "top-k-seed2" / "summary.json").unlink()
    keep_rounds(sweep / "top-k-seed2", 2)
    table = row_table(collect(sweep))
    found = {name: cells(table, name) for name in ("swat", "top-k", "dense", "never-run")}
    assert {name: (line["Seeds finished"], line["Not finished"]) for name, line in found.items()} == {
        "swat": ("1 of 2", "seed 2: no round yet"),
        "top-k": ("1 of 2", "seed 2: round 2 of 4"),
        "dense": ("2 of 2", ""),
        "never-run": ("0 of 2", "no round yet"),
    }
    assert found["swat"]["Final accuracy %"] == "56.00"
    papers = paper_table(collect(sweep))
    assert papers is not None
    assert papers.rows[1][4] == Beside("56.00\n1 of 2 seeds", "74.00 ± 0.74")


def test_a_seed_of_ones_own_is_a_seed_of_its_row(sweep: Path) -> None:
    (sweep / "swat-seed2").rename(sweep / "swat-seed7")
    assert cells(row_table(collect(sweep)), "swat")["Seeds finished"] == "2 of 3"


def test_an_unfinished_seed_leaves_the_others_curves_as_long_as_they_are(
    sweep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_rounds(sweep / "swat-seed2", 2)
    (sweep / "swat-seed2" / "summary.json").unlink()
    drawn: dict[str, tuple[list[int], list[float]]] = {}
    plot = Axes.plot

    def watched(axes: Axes, x: list[int], y: list[float], label: str, **look: Any) -> None:
        drawn[label] = (x, y)
        plot(axes, x, y, label=label, **look)

    monkeypatch.setattr(Axes, "plot", watched)
    accuracy_figure(collect(sweep))
    rounds, values = drawn["swat"]
    assert rounds == [1, 2, 3, 4]
    both = [(accuracy("swat", 1, round) + accuracy("swat", 2, round)) / 2 for round in (1, 2)]
    expected = [*both, accuracy("swat", 1, 3), accuracy("swat", 1, 4)]
    np.testing.assert_allclose(values, np.array(expected) * 100)


def test_a_folder_given_twice_is_there_once(sweep: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    assert main(["report", str(sweep), f"{sweep}/../{sweep.name}", "--out", str(out)]) == 0
    assert out.read_text().count("<h2>") == 1


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("summary.json", "{", "summary.json: expected the summary of a run, but it is damaged: Expecting"),
        ("summary.json", "[]", "summary.json: expected the summary of a run, but it is damaged: it is list"),
        ("summary.json", "{}", "summary.json: expected the summary of a run, but it is damaged: has no name, expected"),
        ("summary.json", "\xff", "summary.json: expected the summary of a run"),
        ("experiment.toml", "rounds = ", "experiment.toml: expected the settings of a run, but it is damaged"),
        ("experiment.toml", "turns = 3", "experiment.toml: expected the settings of a run, but it is damaged: unknown"),
        ("rounds.jsonl", "{}\n", "line 1: expected a record, but it is damaged: has no round, expected a whole number"),
        ("rounds.jsonl", "nothing\n{}\n", "rounds.jsonl, line 1: expected a JSON object, but it is damaged"),
        (
            "rounds.jsonl",
            json.dumps(round_record(1).to_json() | {"train_loss": "high"}),
            "line 1: expected a record, but it is damaged: train_loss = 'high': expected a number, or null",
        ),
        (
            "rounds.jsonl",
            json.dumps(round_record(1).to_json() | {"test_accuracy": math.nan}),
            "line 1: expected a record, but it is damaged: test_accuracy = nan: expected a number in [0, 1], or null",
        ),
        ("snapshots/round-00002.safetensors", "cut", "round-00002.safetensors: expected the kept weights of a round"),
        ("snapshots/round-two.safetensors", "", "round-two.safetensors: expected a name such as"),
    ],
)
def test_a_damaged_file_is_named_in_one_line(
    sweep: Path, capsys: pytest.CaptureFixture[str], file: str, content: str, message: str
) -> None:
    (sweep / "top-k-seed1" / file).write_text(content, encoding="latin-1")
    assert main(["report", str(sweep), "--out", str(sweep / "r.html")]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert message in printed
    assert "top-k-seed1" in printed


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({LAYERS[0]: torch.ones(4)}, f"{LAYERS[1]} is not in every round"),
        (dict.fromkeys(LAYERS, torch.ones(5)), rf"{LAYERS[0]} has shape \(5,\), expected \(4,\) as in the first round"),
        (dict.fromkeys(LAYERS, torch.full((4,), torch.nan)), f"{LAYERS[0]} has weights that are no numbers"),
    ],
)
def test_damaged_snapshots_are_named(sweep: Path, weights: dict[str, torch.Tensor], message: str) -> None:
    save_snapshot(sweep / "top-k-seed1", 4, {name: tensor.clone() for name, tensor in weights.items()})
    with pytest.raises(ResultsError, match=f"snapshots, round 4: {message}"):
        figures(collect(sweep))


def test_a_layer_without_a_weight_is_shown_empty(sweep: Path) -> None:
    for round in (2, 4):
        save_snapshot(sweep / "top-k-seed1", round, {name: torch.zeros(4) for name in LAYERS})
    headings = [figure.heading for figure in figures(collect(sweep))]
    assert "Figures 3, 5 and 6: where the weights are, top-k" in headings
    table = persistence_table(collect(sweep))
    assert table is not None
    assert table.rows[0][3:] == ["", "0.0%", "0.0%"]


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            "rounds.jsonl",
            lambda s: s[: len(s) // 2],
            "expected 2 rounds, as the folder has, but it is damaged: it has 4",
        ),
        (
            "rounds.jsonl",
            lambda s: s.replace('"round": 4', '"round": 3'),
            "line 4: expected round 4, but it is damaged",
        ),
        ("rounds.jsonl", None, "summary.json: expected 0 rounds, as the folder has, but it is damaged: it has 4"),
        ("experiment.toml", None, "swat-seed1 has no experiment.toml"),
        (
            "summary.json",
            lambda s: s.replace("swat-seed1", "dense"),
            "but it is damaged: it has 4 of 'dense'",
        ),
        ("summary.json", lambda s: re.sub('"test_accuracy": 0', '"test_accuracy": 43', s), "expected a number in [0"),
    ],
)
def test_files_of_a_run_that_do_not_belong_together_are_named(
    file: str, change: Callable[[str], str] | None, message: str, sweep: Path
) -> None:
    path = sweep / "swat-seed1" / file
    if change is None:
        path.unlink()
    else:
        path.write_text(change(path.read_text()))
    with pytest.raises(ResultsError, match=re.escape(message)):
        collect(sweep)


def test_a_round_that_is_being_written_is_not_yet_there(sweep: Path) -> None:
    keep_rounds(sweep / "swat-seed1", 2)
    (sweep / "swat-seed1" / "summary.json").unlink()
    with (sweep / "swat-seed1" / "rounds.jsonl").open("a") as file:
        file.write('{"round": 3, "examp')
    assert [len(run.rounds) for run in collect(sweep).rows[0].runs] == [2, 4]


def test_a_name_is_no_formula_no_tag_and_no_column(sweep: Path, tmp_path: Path) -> None:
    name = "<b>$a|b$\\"
    (sweep / "dense-seed1").rename(sweep / name)
    (written,) = (c for c in [collect(sweep)])
    out = tmp_path / "report.html"
    write_report([written], out)
    assert "<b>" not in out.read_text()
    assert "| &lt;b>$a\\|b$\\ |" in out.with_suffix(".md").read_text()


def keep_rounds(run: Path, rounds: int) -> None:
    """As if the run had been stopped, or gone on, after these rounds."""
    lines = (run / "rounds.jsonl").read_text().splitlines(keepends=True)
    (run / "rounds.jsonl").write_text("".join(lines[:rounds]))
