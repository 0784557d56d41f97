"""The report of made-up runs: what it says is what their folders hold."""

import csv
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import safetensors.torch

from tests.report.sweeps import write_sweep
from zerofl.cli import main
from zerofl.report.cells import lines_of, markdown
from zerofl.report.collect import collect
from zerofl.report.figures import by_mask_ratio, figures, frontier
from zerofl.report.tables import persistence_table, tables


def test_a_panel_says_that_a_dense_row_is_in_it(sweep: Path) -> None:
    (figure, *_) = figures(collect(sweep))
    assert b"cifar10, NIID, 95% sparse and dense" in figure.svg


def test_a_dense_row_without_a_sparse_one_of_its_data_has_a_panel(tmp_path: Path) -> None:
    rows = '{ name = "sparse", mask_ratio = 0.1 }, { name = "dense", uplink = "full", sparsity = 0.0, alpha = 1000.0 }'
    directory = write_sweep(tmp_path / "sweep", f"run = [{rows}]\n[base]\nrounds = 4\n")
    (figure, *_) = figures(collect(directory))
    assert b"cifar10, NIID, 95% sparse" in figure.svg
    assert b"cifar10, IID, dense" in figure.svg


def test_figure_2_has_no_clients_that_send_more_than_everything(tmp_path: Path) -> None:
    text = 'run = [{ name = "half", uplink = "top_k_weights", sparsity = 0.5, mask_ratio = 0.6 }]\n[base]\nrounds = 4\n'
    (figure,) = [f for f in figures(collect(write_sweep(tmp_path / "s", text))) if f.heading.startswith("Figure 2")]
    assert b"half: clients send 100%" in figure.svg


def test_no_two_of_many_lines_have_one_colour(tmp_path: Path) -> None:
    rows = ", ".join(f'{{ name = "r{i}", mask_ratio = {i / 100} }}' for i in range(11))
    directory = write_sweep(tmp_path / "many", f"run = [{rows}]\n[base]\nrounds = 4\n")
    (figure, *_) = figures(collect(directory))
    strokes = set(re.findall(rb"stroke: (#[0-9a-f]{6}); stroke-width: 1.2", figure.svg))
    assert len(strokes) == 11


def test_figures_are_those_that_the_runs_have_what_is_needed_for(sweep: Path) -> None:
    headings = [figure.heading for figure in figures(collect(sweep))]
    assert headings == [
        "Accuracy", "Loss", "Accuracy against total communication", "Accuracy against what is sent",
        "Figure 2: non-zero ratio after the aggregation",
        "Overlap of the clients' masks", "Overlap of the clients' masks by layer",
        *(f"Figures 3, 5 and 6: where the weights are, {row}" for row in ("swat", "top-k", "dense")),
    ]  # fmt: skip
    assert all(figure.svg.startswith(b"<?xml") for figure in figures(collect(sweep)))


def test_the_frontier_joins_the_rows_that_no_other_beats(sweep: Path) -> None:
    # top-k sends the least and ends lowest, dense sends as much as swat and ends above it.
    collection = collect(sweep)
    (figure,) = [figure for figure in figures(collection) if figure.heading == "Accuracy against what is sent"]
    for name in (b"swat", b"top-k", b"dense"):
        assert b"<!-- %b -->" % name in figure.svg
    steps = re.findall(rb'<path d="([^"]*)"[^>]*stroke: #999999', figure.svg)
    assert [len(re.findall(rb"[ML] ", line)) for line in steps] == [3, 3]  # up, both ways: top-k, along and up to dense
    swat, top_k, _, _ = collection.rows
    assert frontier(collection._replace(rows=[swat, top_k])) is None


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


@pytest.mark.parametrize("option", ["average_decay = 0.9", 'downlink_values = "int8"', 'server_optimizer = "fedavgm"'])
def test_a_row_beyond_the_paper_is_none_of_figure_4s_mask_ratios(option: str, tmp_path: Path) -> None:
    text = four_ratios("alpha = 1.0").replace("mask_ratio = 0.4", f"mask_ratio = 0.4, {option}")
    assert by_mask_ratio(collect(write_sweep(tmp_path / "sweep", text))) is None


def test_a_dense_row_has_no_heat_map(sweep: Path) -> None:
    for file in (sweep / "dense-seed1" / "snapshots").iterdir():
        file.write_bytes(safetensors.torch.save({}))
    headings = [figure.heading for figure in figures(collect(sweep))]
    assert [heading for heading in headings if "where the weights are" in heading] == [
        f"Figures 3, 5 and 6: where the weights are, {row}" for row in ("swat", "top-k")
    ]
    table = persistence_table(collect(sweep))
    assert table is not None
    assert {row[0] for row in table.rows} == {"top-k"}


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
