"""The report of made-up runs: what it says is what their folders hold."""

import csv
import json
import math
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import tomli_w
import torch
from matplotlib.axes import Axes

from tests.running import round_record
from zerofl.cli import main
from zerofl.data import DATASETS, femnist, load_dataset, speech
from zerofl.exchange.wire import schema_of
from zerofl.experiment import Experiment
from zerofl.fl.records import RoundRecord, Summary, savings
from zerofl.models import build_model
from zerofl.report.cells import Beside, Table, as_csv, lines_of, markdown
from zerofl.report.collect import collect
from zerofl.report.figures import accuracy as accuracy_figure
from zerofl.report.figures import by_mask_ratio, figures, persistence_table
from zerofl.report.page import write_report
from zerofl.report.paper_bytes import PAPER_MB
from zerofl.report.sizes import SHAPES, counted_bytes
from zerofl.report.tables import paper_table, row_table, settings_table, tables, time_table, traffic_table
from zerofl.run.checkpoint import save_snapshot
from zerofl.run.files import ResultsError
from zerofl.run.folder import read_experiment, read_summary
from zerofl.run.sweep import METRICS, read_sweep

SWEEP = """# What this reproduces,
# in two lines.
#
#   zerofl run it

seeds = [1, 2]
run = [
  { name = "swat", uplink = "full", paper = { accuracy = 74.0, deviation = 0.74, size = 43.7, savings = 1.0 } },
  { name = "top-k", uplink = "top_k_weights", mask_ratio = 0.1, paper = { accuracy = 73.65, size = 14.4 } },
  { name = "dense", uplink = "full", sparsity = 0.0 },
  { name = "never-run", uplink = "full", alpha = 1000.0 },
]
[base]
rounds = 4
snapshot_every = 2
"""
LAYERS = ("layer1.conv1", "layer1.conv2")
SECONDS = {"swat": 2.0, "dense": 8.0}
UPLINK_BYTES = {"swat": 40_000_000, "dense": 40_000_000}


def accuracy(row: str, seed: int, round: int) -> float:
    return {"swat": 0.5, "dense": 0.6}.get(row, 0.4) + 0.02 * seed + 0.01 * round


def write_sweep(directory: Path, text: str = SWEEP, unfinished: str = "") -> Path:
    """The folders that runs of the sweep would leave; those of the row `unfinished` stopped after two rounds."""
    directory.mkdir(parents=True)
    (directory / "sweep.toml").write_text(text)
    for row in read_sweep(directory / "sweep.toml").rows:
        if row.name == "never-run":
            continue
        for e in row.experiments:
            folder = directory / e.name
            folder.mkdir()
            (folder / "experiment.toml").write_text(tomli_w.dumps(vars(e)))
            rounds = range(1, 3 if row.name == unfinished else 5)
            records = [record_of(row.name, e.seed, round, e.uplink) for round in rounds]
            (folder / "rounds.jsonl").write_text("".join(json.dumps(record.to_json()) + "\n" for record in records))
            if row.name != unfinished:
                (folder / "summary.json").write_text(json.dumps(summary_of(row.name, e).to_json()))
            for round in (2, 4):
                weights = {layer: torch.tensor([1.0, 2.0, 0.0, 3.0 * (round == 4)]) for layer in LAYERS}
                save_snapshot(folder, round, weights)
    return directory


def record_of(row: str, seed: int, round: int, uplink: str) -> RoundRecord:
    return round_record(
        round, train_loss=2.0 / round, test_accuracy=accuracy(row, seed, round), examples=4000,
        train_seconds=SECONDS.get(row, 1.0), train_cpu_seconds=1.5 * SECONDS.get(row, 1.0), realised_sparsity=0.95,
        uplink_bytes=10 * UPLINK_BYTES.get(row, 10_000_000), refused_bytes=1_000, downlink_bytes=300_000_000,
        nonzero_ratio=dict.fromkeys(LAYERS, 0.2),
        mask_overlap={} if uplink == "full" else dict.fromkeys(LAYERS, 0.7),
    )  # fmt: skip


def summary_of(row: str, e: Experiment) -> Summary:
    uplink_bytes = 4 * 10 * UPLINK_BYTES.get(row, 10_000_000)
    return Summary(
        name=e.name, rounds=4, validation_accuracy=accuracy(row, e.seed, 4) - 0.1,
        test_accuracy=accuracy(row, e.seed, 4), best_test_accuracy=accuracy(row, e.seed, 4) + 0.01,
        uplink_bytes=uplink_bytes, refused_bytes=4_000, downlink_bytes=4 * 300_000_000, updates=40,
        full_model_bytes=44_000_000, savings=savings(44_000_000, 40, uplink_bytes), failures=0, seconds=9.0,
        train_seconds=4 * SECONDS.get(row, 1.0), threads=2, machine="a machine", versions={"torch": "2.13"},
        data_sha256="ab" * 32, flops_a_sample={"dense": 3.3e9, "sparse": 0.4e9},
    )  # fmt: skip


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    return write_sweep(tmp_path / "sweep")


def cells(table: Table, row: str) -> dict[str, str]:
    """The cells of a row by column, the lines of each with a space in between."""
    (line,) = (line for line in table.rows if line[0] == row)
    return {column: " ".join(lines_of(cell)) for column, cell in zip(table.columns, line, strict=True)}


def test_a_row_shows_mean_and_deviation_of_its_seeds_beside_the_papers(sweep: Path) -> None:
    collection = collect(sweep)
    assert collection.about == "What this reproduces, in two lines."
    assert [row.name for row in collection.rows] == ["swat", "top-k", "dense", "never-run"]
    line = cells(row_table(collection), "swat")
    # Seeds 1 and 2 end at 0.56 and 0.58: the sample deviation of two values is their difference over sqrt(2).
    assert line["Final accuracy %"] == "57.00 ± 1.41"
    assert line["Best accuracy %"] == "58.00 ± 1.41"
    assert line["Paper %"] == "74.00 ± 0.74"
    assert line["Difference"] == "-17.00"
    assert line["MB an update"] == "40.00 (43.7)"
    assert line["Savings"] == "1.1x (1.0x)"
    assert (line["Seeds finished"], line["Not finished"]) == ("2 of 2", "")
    assert cells(row_table(collection), "dense")["Paper %"] == ""


def test_the_papers_layout_has_a_column_for_each_strategy(sweep: Path) -> None:
    table = paper_table(collect(sweep))
    assert table is not None
    strategies = ["Dense FedAvg NIID", "Full Model (SWAT) IID", "Full Model (SWAT) NIID", "Top-K-W. NIID"]
    assert table.columns[2:6] == strategies
    assert [line[:2] for line in table.rows] == [["0%", "—"], ["95%", "—"], ["95%", "0.1"]]
    assert table.rows[2][5] == Beside("47.00 ± 1.41", "73.65")
    assert table.rows[2][2:5] == ["", "", ""]
    assert table.rows[1][3] == Beside("no round yet", "")


def test_the_papers_layout_names_the_data_set_where_there_are_several(tmp_path: Path) -> None:
    text = SWEEP.replace('name = "dense"', 'name = "dense", dataset = "femnist"')
    table = paper_table(collect(write_sweep(tmp_path / "sweep", text)))
    assert table is not None
    assert table.columns[0] == "Dataset"
    assert [line[0] for line in table.rows] == ["cifar10", "cifar10", "femnist"]


def test_rows_that_would_share_a_cell_have_no_such_table(tmp_path: Path) -> None:
    text = SWEEP.replace('{ name = "dense", uplink = "full", sparsity = 0.0 }', '{ name = "dense", uplink = "full" }')
    collection = collect(write_sweep(tmp_path / "sweep", text))
    assert paper_table(collection) is None
    assert tables(collection)[0].heading == "Every row"


def test_local_training_stands_beside_the_dense_row(sweep: Path) -> None:
    line = cells(time_table(collect(sweep)), "top-k")
    # 1.5 s of the CPU for 4,000 samples in 1 s, where the dense row takes 12 s in 8 s.
    assert (line["CPU s for 1,000 samples"], line["Wall s for 1,000 samples"]) == ("0.38", "0.25")
    assert line["Dense / this"] == "8.00x"
    assert (line["MFLOP a sample, dense"], line["MFLOP a sample, sparse"]) == ("3300", "400")
    assert line["Realised sparsity"] == "95.00%"


def rewrite_rounds(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    records = [change(json.loads(line)) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    (folder / "rounds.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_other_work_beside_a_row_does_not_change_its_ratio(sweep: Path) -> None:
    for seed in (1, 2):
        rewrite_rounds(sweep / f"top-k-seed{seed}", lambda record: record | {"train_seconds": 5.0})
    line = cells(time_table(collect(sweep)), "top-k")
    assert (line["Wall s for 1,000 samples"], line["Dense / this"]) == ("1.25", "8.00x")


def test_rows_without_cpu_seconds_are_compared_by_the_wall_and_say_so(sweep: Path) -> None:
    def without(record: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in record.items() if key != "train_cpu_seconds"}

    rewrite_rounds(sweep / "top-k-seed1", without)
    line = cells(time_table(collect(sweep)), "top-k")
    assert (line["CPU s for 1,000 samples"], line["Dense / this"]) == ("", "8.00x (wall)")
    assert line["Realised sparsity"] == "95.00% (after the last step)"  # as it was counted when there were none


def test_both_ways_are_counted(sweep: Path) -> None:
    table = traffic_table(collect(sweep))
    assert table is not None
    line = cells(table, "top-k")
    # 40 updates of 10 MB up, 1,200 MB down; the model's 44 MB up and down 40 times would be 3,520 MB.
    assert (line["Uplink MB"], line["Downlink MB"], line["Both MB"]) == ("400.0 ± 0.0", "1200.0 ± 0.0", "1600.0")
    assert line["Savings, both ways"] == "2.2x"
    (run, _) = next(row for row in collect(sweep).rows if row.name == "top-k").runs
    # The figure ends where the table does: the 4 kB that were refused count apart in both.
    assert run.traffic() == {round: round * 400_000_000 for round in (1, 2, 3, 4)}
    assert line["Both MB"] == f"{run.traffic()[4] / 1e6:.1f}"


def test_a_panel_says_that_a_dense_row_is_in_it(sweep: Path) -> None:
    (figure, *_) = figures(collect(sweep))
    assert b"cifar10, NIID, 95% sparse and dense" in figure.svg


def test_no_two_of_many_lines_have_one_colour(tmp_path: Path) -> None:
    rows = ", ".join(f'{{ name = "r{i}", mask_ratio = {i / 100} }}' for i in range(11))
    directory = write_sweep(tmp_path / "many", f"run = [{rows}]\n[base]\nrounds = 4\n")
    (figure, *_) = figures(collect(directory))
    strokes = set(re.findall(rb"stroke: (#[0-9a-f]{6}); stroke-width: 1.2", figure.svg))
    assert len(strokes) == 11


def test_settings_are_those_that_differ_and_those_that_are_shared(sweep: Path) -> None:
    table = settings_table(collect(sweep))
    assert table.columns == ["Row", "sparsity", "activation_sparsity", "uplink", "mask_ratio"]
    assert cells(table, "dense")["sparsity"] == "0.0"
    assert "rounds = 4" in table.note


def test_positions_that_stay_are_counted(sweep: Path) -> None:
    """Positions 0 and 1 are there in both; 3 comes in: all of the first stay, and by chance three quarters would."""
    table = persistence_table(collect(sweep))
    assert table is not None
    assert [line[:2] for line in table.rows] == [["top-k", layer] for layer in LAYERS]
    assert table.rows[0][2:] == ["100.0%", "100.0%", "75.0%"]


def test_figures_are_those_that_the_runs_have_what_is_needed_for(sweep: Path) -> None:
    headings = [figure.heading for figure in figures(collect(sweep))]
    assert headings == [
        "Accuracy", "Loss", "Accuracy against total communication", "Figure 2: non-zero ratio after the aggregation",
        "Overlap of the clients' masks", "Overlap of the clients' masks by layer",
        *(f"Figures 3, 5 and 6: where the weights are, {row}" for row in ("swat", "top-k", "dense")),
    ]  # fmt: skip
    assert all(figure.svg.startswith(b"<?xml") for figure in figures(collect(sweep)))


def test_centralised_rows_make_figure_1_and_four_mask_ratios_figure_4(tmp_path: Path) -> None:
    rows = ['{ name = "centralised", uplink = "full", clients = 1, clients_per_round = 1 }']
    rows += [f'{{ name = "mask-{ratio}", mask_ratio = {ratio} }}' for ratio in (0.1, 0.2, 0.3, 0.4)]
    text = f"run = [{', '.join(rows)}]\n[base]\nrounds = 4"
    headings = [figure.heading for figure in figures(collect(write_sweep(tmp_path / "sweep", text)))]
    assert headings[0] == "Figure 1: centralised and federated SWAT"
    assert "Figure 4: accuracy against the mask ratio" in headings


class Links(HTMLParser):
    """Everything in a page that a browser would fetch or run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.found += [value or "" for name, value in attributes if name in ("src", "href", "srcset", "style")]


def test_the_page_is_self_contained_and_its_tables_are_the_markdowns_and_csvs(sweep: Path, tmp_path: Path) -> None:
    out = tmp_path / "there" / "report.html"
    assert main(["report", str(sweep), str(sweep / "swat-seed1"), "--out", str(out)]) == 0
    page, text = out.read_text(), out.with_suffix(".md").read_text()
    links = Links()
    links.feed(page)
    assert links.found
    assert all(link.startswith("data:image/svg+xml;base64,") for link in links.found)
    assert not {"script", "link", "iframe"} & set(links.tags)
    assert not re.search(r"url\(|@import", page[: page.index("</style>")])
    for table in tables(collect(sweep)):
        assert markdown(table) in text
        for line in table.rows:
            assert all(part.replace("'", "&#x27;") in page for cell in line for part in lines_of(cell))
    lines = list(csv.reader(out.with_suffix(".csv").read_text().splitlines()))
    assert ["sweep", "Every row", "swat", "2 of 2", "", "57.00 ± 1.41"] in [line[:6] for line in lines]


def test_a_row_that_is_not_finished_is_shown_as_far_as_it_has_come(tmp_path: Path) -> None:
    collection = collect(write_sweep(tmp_path / "sweep", unfinished="top-k"))
    line = cells(row_table(collection), "top-k")
    far = "seed 1: round 2 of 4, seed 2: round 2 of 4"
    assert (line["Seeds finished"], line["Not finished"], line["Final accuracy %"]) == ("0 of 2", far, "")
    table = paper_table(collection)
    assert table is not None
    assert table.rows[2][5] == Beside("round 2 of 4", "73.65")
    assert figures(collection)


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


def four_ratios(*settings: str) -> str:
    rows = [
        f'{{ name = "mask-{ratio}-{i}", mask_ratio = {ratio}, {more} }}'
        for i, more in enumerate(settings)
        for ratio in (0.1, 0.2, 0.3, 0.4)
    ]
    return f"run = [{', '.join(rows)}]\n[base]\nrounds = 4"


def test_figure_4_has_a_line_for_each_way_of_dealing(tmp_path: Path) -> None:
    text = four_ratios("alpha = 1.0", "alpha = 1000.0", 'dataset = "femnist"')
    figure = by_mask_ratio(collect(write_sweep(tmp_path / "sweep", text)))
    assert figure is not None
    picture = figure.svg.decode()
    assert all(f"Top-K-W., 95%, {dealt}" in picture for dealt in ("cifar10, NIID", "cifar10, IID", "femnist, NIID"))


def test_figure_4_needs_four_different_mask_ratios_in_one_line(tmp_path: Path) -> None:
    """As in Table 1, whose three are there IID and not; and three of which one is there twice."""
    text = four_ratios("alpha = 1.0", "alpha = 1000.0").replace("mask_ratio = 0.4", "mask_ratio = 0.3")
    assert by_mask_ratio(collect(write_sweep(tmp_path / "sweep", text))) is None


def test_a_dense_row_has_no_heat_map(sweep: Path) -> None:
    for file in (sweep / "dense-seed1" / "snapshots").iterdir():
        file.write_bytes(safetensors.torch.save({}))
    headings = [figure.heading for figure in figures(collect(sweep))]
    assert not any(heading.endswith("dense") for heading in headings)
    assert persistence_table(collect(sweep))


def test_the_page_must_be_html_and_is_not_written_over_what_is_no_report(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("report.md", "report", "sweep.csv"):
        assert main(["report", str(sweep), "--out", str(tmp_path / name)]) == 2
        assert f"{name}: expected a name ending in .html" in capsys.readouterr().err
        assert not (tmp_path / name).exists()
    for suffix in (".html", ".md", ".csv"):
        mine = tmp_path / f"mine{suffix}"
        mine.write_text("# My own")
        assert main(["report", str(sweep), "--out", str(tmp_path / "mine.html")]) == 2
        assert f"mine{suffix} is there and was not made by zerofl report" in capsys.readouterr().err
        assert mine.read_text() == "# My own"
        mine.unlink()
    for _ in range(2):  # the second over the first
        assert main(["report", str(sweep), "--out", str(tmp_path / "report.html")]) == 0


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
    assert figures(collect(sweep))
    table = persistence_table(collect(sweep))
    assert table is not None
    assert table.rows[0][2:] == ["", "0.0%", "0.0%"]


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


def test_markdown_keeps_a_cell_in_its_line() -> None:
    table = Table("A\nheading", ["x|y"], [[Beside("1\n2", "<3")]], "a\nnote")
    assert markdown(table) == "### A heading\n\n| x\\|y |\n| --- |\n| 1<br>2<br>(&lt;3) |\n\na note\n"


def test_tables_of_one_heading_have_one_header_and_the_papers_figures_their_own_column() -> None:
    named = [
        ("one", Table("T", ["Row", "MB"], [["a", Beside("1.0", "2.0")]])),
        ("one", Table("U", ["Row"], [["a"]])),
        ("two", Table("T", ["Row", "Loss"], [["b", "3"]])),
    ]
    assert as_csv(named).splitlines() == [
        'folder,table,Row,MB,"MB, paper",Loss', "one,T,a,1.0,2.0,", "two,T,b,,,3", "", "folder,table,Row", "one,U,a",
    ]  # fmt: skip


def test_the_paper_counts_its_own_models_as_it_prints_them() -> None:
    for mask_ratio, printed in ((0.0, 5.9), (0.1, 14.4), (0.2, 23.0)):
        counted = counted_bytes(Experiment(sparsity=0.95, mask_ratio=mask_ratio))
        assert counted / PAPER_MB == pytest.approx(printed, abs=0.07)
    assert counted_bytes(Experiment(uplink="full")) / PAPER_MB == pytest.approx(43.7, abs=0.06)
    assert counted_bytes(Experiment(sparsity=0.0)) == 2 * counted_bytes(Experiment(uplink="full"))


def test_a_narrower_models_sizes_are_not_the_papers(tmp_path: Path) -> None:
    collection = collect(write_sweep(tmp_path / "sweep", f"{SWEEP}width = 16"))
    table = row_table(collection)
    assert cells(table, "swat")["MB an update"] == "40.00 (43.7 at width 64)"
    # A sixteenth of the full width's, and a little more: the stem and the last layer shrink less.
    assert cells(table, "swat")["The paper's count, MB"] == "2.7"
    assert "ResNet-18 at width 16, the paper's at width 64" in table.note
    assert "at width" not in row_table(collect(write_sweep(tmp_path / "whole"))).note


def test_the_shapes_are_those_of_the_data_sets(cifar_root: Path) -> None:
    assert SHAPES.keys() == DATASETS.keys()
    for name, root in (("cifar10", str(cifar_root)), ("mnist5k", "")):
        dataset = load_dataset(name, root)
        assert SHAPES[name] == (dataset.train.images.shape[1], len(dataset.classes))
    assert [SHAPES[name][1] for name in ("femnist", "speech_commands")] == [len(femnist.CLASSES), len(speech.CLASSES)]
    assert SHAPES["speech_commands_by_speaker"] == SHAPES["speech_commands"]


def test_recorded_runs_sent_models_of_these_shapes() -> None:
    """The length of the whole model in each recorded summary is that of the model which the sizes are counted of."""
    folders = [path.parent for path in (Path(__file__).parents[2] / "results").glob("*/*/summary.json")]
    assert folders
    for folder in folders:
        e = read_experiment(folder)
        channels, classes = SHAPES[e.dataset]
        schema = schema_of(build_model(e.model, classes, channels, e.width).state_dict())
        assert read_summary(folder).full_model_bytes == schema.dense_bytes, folder


def test_a_sweep_may_report_validation_accuracy(tmp_path: Path) -> None:
    text = f'metric = "validation_accuracy"\n{SWEEP}'
    table = paper_table(collect(write_sweep(tmp_path / "sweep", text)))
    assert table is not None
    assert table.heading == "Validation accuracy as the paper's table has it"
    line = cells(row_table(collect(tmp_path / "sweep")), "swat")
    # 0.1 below the final test accuracy, which is 0.57 in the mean.
    assert line["Validation accuracy %"] == "47.00 ± 1.41"
    assert line["Difference"] == "-27.00"
    assert "validation_accuracy" in METRICS


def keep_rounds(run: Path, rounds: int) -> None:
    """As if the run had been stopped, or gone on, after these rounds."""
    lines = (run / "rounds.jsonl").read_text().splitlines(keepends=True)
    (run / "rounds.jsonl").write_text("".join(lines[:rounds]))
