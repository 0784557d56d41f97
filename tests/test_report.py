"""The report of made-up runs: what it says is what their folders hold."""

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch

from zerofl.cli import main
from zerofl.report.collect import collect
from zerofl.report.figures import figures, persistence_table
from zerofl.report.tables import markdown, paper_table, row_table, settings_table, tables, time_table
from zerofl.results import ResultsError, save_snapshot
from zerofl.sweep import read_sweep

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
            (folder / "rounds.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
            if row.name != unfinished:
                (folder / "summary.json").write_text(json.dumps(summary_of(row.name, e.seed)))
            for round in (2, 4):
                weights = {layer: torch.tensor([1.0, 2.0, 0.0, 3.0 * (round == 4)]) for layer in LAYERS}
                save_snapshot(folder, round, weights)
    return directory


def record_of(row: str, seed: int, round: int, uplink: str) -> dict[str, Any]:
    return {
        "round": round, "train_loss": 2.0 / round, "test_accuracy": accuracy(row, seed, round), "examples": 4000,
        "train_seconds": SECONDS.get(row, 1.0), "realised_sparsity": 0.95,
        "uplink_bytes": 10 * UPLINK_BYTES.get(row, 10_000_000),
        "nonzero_ratio": dict.fromkeys(LAYERS, 0.2),
        "mask_overlap": {} if uplink == "full" else dict.fromkeys(LAYERS, 0.7),
    }  # fmt: skip


def summary_of(row: str, seed: int) -> dict[str, Any]:
    return {
        "test_accuracy": accuracy(row, seed, 4), "best_test_accuracy": accuracy(row, seed, 4) + 0.01,
        "uplink_bytes": 4 * 10 * UPLINK_BYTES.get(row, 10_000_000), "updates": 40, "full_model_bytes": 44_000_000,
        "train_seconds": 4 * SECONDS.get(row, 1.0), "threads": 2, "machine": "a machine", "versions": {"torch": "2.13"},
        "data_sha256": "ab" * 32, "flops_a_sample": {"dense": 3.3e9, "sparse": 0.4e9},
    }  # fmt: skip


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    return write_sweep(tmp_path / "sweep")


def cells(table: Any, row: str) -> dict[str, str]:
    (line,) = (line for line in table.rows if line[0] == row)
    return dict(zip(table.columns, line, strict=True))


def test_a_row_shows_mean_and_deviation_of_its_seeds_beside_the_papers(sweep: Path) -> None:
    collection = collect(sweep)
    assert collection.about == "What this reproduces, in two lines."
    assert [row.name for row in collection.rows] == ["swat", "top-k", "dense"]
    line = cells(row_table(collection), "swat")
    # Seeds 1 and 2 end at 0.56 and 0.58: the sample deviation of two values is their difference over sqrt(2).
    assert line["Final accuracy %"] == "57.00 ± 1.41"
    assert line["Best accuracy %"] == "58.00 ± 1.41"
    assert line["Paper %"] == "74.00 ± 0.74"
    assert line["Difference"] == "-17.00"
    assert line["MB an update"] == "40.00 (43.7)"
    assert line["Savings"] == "1.1x (1.0x)"
    assert line["Rounds"] == "4 of 4"
    assert cells(row_table(collection), "dense")["Paper %"] == ""


def test_the_papers_layout_has_a_column_for_each_strategy(sweep: Path) -> None:
    table = paper_table(collect(sweep))
    assert table is not None
    assert table.columns[3:6] == ["Dense FedAvg NIID", "Full Model (SWAT) NIID", "Top-K-W. NIID"]
    assert [line[1:3] for line in table.rows] == [["0%", "—"], ["95%", "—"], ["95%", "0.1"]]
    assert table.rows[2][5] == "47.00 ± 1.41 (73.65)"
    assert table.rows[2][3:5] == ["", ""]


def test_rows_that_would_share_a_cell_have_no_such_table(tmp_path: Path) -> None:
    text = SWEEP.replace('{ name = "dense", uplink = "full", sparsity = 0.0 }', '{ name = "dense", uplink = "full" }')
    collection = collect(write_sweep(tmp_path / "sweep", text))
    assert paper_table(collection) is None
    assert tables(collection)[0].heading == "Every row"


def test_local_training_stands_beside_the_dense_row(sweep: Path) -> None:
    line = cells(time_table(collect(sweep)), "top-k")
    # 1 s for 4,000 samples, where the dense row takes 8 s.
    assert line["s for 1,000 samples"] == "0.25"
    assert line["Dense / this"] == "8.00x"
    assert (line["MFLOP a sample, dense"], line["MFLOP a sample, sparse"]) == ("3300", "400")
    assert line["Realised sparsity"] == "95.00%"


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
        "Accuracy", "Loss", "Figure 2: non-zero ratio after the aggregation", "Overlap of the clients' masks",
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
            assert all(cell.replace("'", "&#x27;") in page for cell in line)
    lines = list(csv.reader(out.with_suffix(".csv").read_text().splitlines()))
    assert ["sweep", "Every row", "swat", "2", "4 of 4", "57.00 ± 1.41"] in [line[:6] for line in lines]


def test_a_row_that_is_not_finished_is_shown_as_far_as_it_has_come(tmp_path: Path) -> None:
    collection = collect(write_sweep(tmp_path / "sweep", unfinished="top-k"))
    line = cells(row_table(collection), "top-k")
    assert (line["Seeds"], line["Rounds"], line["Final accuracy %"]) == ("0", "2 of 4", "")
    table = paper_table(collection)
    assert table is not None
    assert table.rows[2][5] == "not finished (73.65)"
    assert figures(collection)


def test_what_is_not_a_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ResultsError, match="holds no run with a finished round"):
        collect(tmp_path)
    assert main(["report", str(tmp_path / "nowhere"), "--out", str(tmp_path / "r.html")]) == 2
    assert "nowhere holds no run" in capsys.readouterr().err
    assert not (tmp_path / "r.html").exists()
