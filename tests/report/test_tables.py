"""The tables of a report: means and deviations, the paper's layout and figures, sizes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.report.sweeps import LAYERS, SWEEP, cells, write_sweep
from zerofl.data import DATASETS, load_dataset
from zerofl.exchange.wire import schema_of
from zerofl.experiment import Experiment
from zerofl.models import build_model
from zerofl.report.cells import Beside, Table, as_csv, markdown
from zerofl.report.collect import collect
from zerofl.report.paper_bytes import PAPER_MB
from zerofl.report.sizes import counted_bytes
from zerofl.report.tables import (
    paper_table,
    persistence_table,
    row_table,
    setting,
    settings_table,
    tables,
    time_table,
    traffic_table,
)
from zerofl.run.checkpoint import save_snapshot
from zerofl.run.folder import read_experiment, read_summary
from zerofl.run.sweep import METRICS


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
    assert line["MB down for it"] == "30.00"  # 1,200 MB for 40 updates
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


@pytest.mark.parametrize("option", ["average_decay = 0.9", 'server_optimizer = "fedadam_sparse"'])
def test_the_papers_layout_leaves_out_what_goes_beyond_it(option: str, tmp_path: Path) -> None:
    text = SWEEP.replace("run = [", f'run = [\n  {{ name = "beyond", mask_ratio = 0.1, {option} }},')
    collection = collect(write_sweep(tmp_path / "sweep", text))
    table = paper_table(collection)
    assert table is not None  # "top-k" has the same strategy, sparsity and mask ratio
    assert table.rows[2][5] == Beside("47.00 ± 1.41", "73.65")
    assert cells(row_table(collection), "beyond")["Final accuracy %"] == "47.00 ± 1.41"


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
        return {key: value for key, value in record.items() if key not in ("train_cpu_seconds", "refused_bytes")}

    rewrite_rounds(sweep / "top-k-seed1", without)
    line = cells(time_table(collect(sweep)), "top-k")
    assert (line["CPU s for 1,000 samples"], line["Dense / this"]) == ("", "8.00x (wall)")
    assert line["Realised sparsity"] == "95.00% (after the last step)"  # as it was counted when there were none


def test_a_record_of_today_without_cpu_seconds_is_not_taken_for_an_old_one(sweep: Path) -> None:
    rewrite_rounds(sweep / "top-k-seed1", lambda record: record | {"train_cpu_seconds": None})
    assert cells(time_table(collect(sweep)), "top-k")["Realised sparsity"] == "95.00%"


def test_energy_is_compared_as_measured_or_as_estimated_and_says_which(sweep: Path) -> None:
    assert not any("J" in column.split() for column in time_table(collect(sweep)).columns)  # nobody knows of any

    def joules(per_round: float, **more: float) -> Callable[[dict[str, Any]], dict[str, Any]]:
        return lambda record: record | {"train_joules_estimate": per_round} | more

    for seed in (1, 2):
        rewrite_rounds(sweep / f"dense-seed{seed}", joules(90.0, train_joules=160.0))
        rewrite_rounds(sweep / f"top-k-seed{seed}", joules(9.0, train_joules=20.0))
        rewrite_rounds(sweep / f"swat-seed{seed}", joules(18.0))
    table = time_table(collect(sweep))
    shown = {row: cells(table, row) for row in ("dense", "top-k", "swat")}
    # For 4,000 samples a round. The measured joules are compared where both rows have them.
    assert {row: line["J for 1,000 samples"] for row, line in shown.items()} == {
        "dense": "40.0", "top-k": "5.0", "swat": "4.5 (estimate)",
    }  # fmt: skip
    assert {row: line["J, dense / this"] for row, line in shown.items()} == {
        "dense": "1.00x", "top-k": "8.00x", "swat": "5.00x (estimate)",
    }  # fmt: skip
    assert all(words in table.note for words in ("Joules are measured", "Joules marked (estimate)", "not covered are"))
    for seed in (1, 2):
        settings = sweep / f"swat-seed{seed}" / "experiment.toml"
        settings.write_text(settings.read_text().replace("watts_per_core = 0.0", "watts_per_core = 4.0"))
    assert cells(time_table(collect(sweep)), "swat")["J, dense / this"] == ""  # of other watts than the dense row's


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
    assert table.rows[0][2:] == ["2", "100.0%", "100.0%", "75.0%"]
    # A last round that follows sooner counts as the last, and not among those that stay for two rounds.
    save_snapshot(sweep / "top-k-seed1", 5, {name: torch.tensor([1.0, 0.0, 0.0, 0.0]) for name in LAYERS})
    table = persistence_table(collect(sweep))
    assert table is not None
    assert table.rows[0][2:] == ["2", "100.0%", "50.0%", "25.0%"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"alpha": 1.0}, "NIID"),
        ({"alpha": 1000.0}, "IID"),
        ({"partition": "natural"}, "natural"),
        ({"partition": "node", "alpha": 1.0}, "node"),
        ({"clients": 1, "clients_per_round": 1}, "centralised"),
    ],
)
def test_how_the_data_is_dealt_is_said_as_it_was(values: dict[str, Any], words: str) -> None:
    assert setting(Experiment(**values)) == words


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
    for name, root in (("cifar10", str(cifar_root)), ("mnist5k", "")):
        dataset = load_dataset(name, root)
        assert DATASETS[name][1:3] == (dataset.train.images.shape[1], len(dataset.classes))


def test_recorded_runs_sent_models_of_these_shapes() -> None:
    """The length of the whole model in each recorded summary is that of the model which the sizes are counted of."""
    folders = [path.parent for path in (Path(__file__).parents[2] / "results").glob("*/*/summary.json")]
    assert folders
    for folder in folders:
        e = read_experiment(folder)
        source = DATASETS[e.dataset]
        schema = schema_of(build_model(e.model, source.classes, source.channels, e.width).state_dict())
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
