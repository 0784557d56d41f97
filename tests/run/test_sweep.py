from pathlib import Path

import pytest

from zerofl.experiment import ExperimentError
from zerofl.run.files import EXPERIMENT, ResultsError
from zerofl.run.sweep import Sweep, find_sweep, keep_sweep, read_sweep

FILE = """
seeds = [1, 2]
metric = "best_test_accuracy"
run = [
  { name = "a", paper = { accuracy = 74, deviation = 0.74, size = 43.7, savings = 1.0 } },
  { name = "b", uplink = "full" },
]
[base]
rounds = 7
"""


def read(tmp_path: Path, text: str, **settings: object) -> Sweep:
    path = tmp_path / "file.toml"
    path.write_text(text)
    return read_sweep(path, settings)


def test_a_row_is_run_with_every_seed(tmp_path: Path) -> None:
    sweep = read(tmp_path, FILE)
    assert [row.name for row in sweep.rows] == ["a", "b"]
    assert [(e.name, e.seed, e.rounds) for e in sweep.rows[0].experiments] == [("a-seed1", 1, 7), ("a-seed2", 2, 7)]
    assert sweep.rows[0].paper == {"accuracy": 74.0, "deviation": 0.74, "size": 43.7, "savings": 1.0}
    assert sweep.rows[1].paper == {}
    assert sweep.metric == "best_test_accuracy"
    assert list(sweep.experiments()) == ["a-seed1", "a-seed2", "b-seed1", "b-seed2"]


def test_a_byte_order_mark_is_read_over(tmp_path: Path) -> None:
    """As Windows' editors put it before a text."""
    path = tmp_path / "file.toml"
    path.write_text(FILE, encoding="utf-8-sig")
    assert list(read_sweep(path).experiments()) == ["a-seed1", "a-seed2", "b-seed1", "b-seed2"]


def test_a_seed_from_the_command_line_replaces_the_files(tmp_path: Path) -> None:
    assert list(read(tmp_path, FILE, seed=5).experiments()) == ["a-seed5", "b-seed5"]


def test_settings_are_of_the_rows_and_runs_that_are_chosen(tmp_path: Path) -> None:
    path = tmp_path / "file.toml"
    path.write_text(FILE)
    for only in ("b", "b-seed2"):
        first, second = read_sweep(path, {"uplink": "full", "trim_clients": 1, "min_replies": 3}, [only]).rows
        assert {e.trim_clients for e in first.experiments} == {0}
        assert {e.trim_clients for e in second.experiments} == {1}


def test_one_name_is_not_given_to_several_runs(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match=r"name = 'x': .*file\.toml has several runs, .* with --out"):
        read(tmp_path, FILE, name="x")
    one = '[[run]]\nname = "a"'
    with pytest.raises(ExperimentError, match="has several runs"):
        read(tmp_path, f"seeds = [1]\n{one}", name="x")  # it would be NAME-seed1 again
    assert list(read(tmp_path, one, name="x").experiments()) == ["x"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("seeds = 1", r"seeds = 1: expected a list of whole numbers"),
        ("seeds = []", r"seeds = \[\]: expected a list of whole numbers"),
        ("seeds = [true]", r"seeds = \[True\]: expected a list of whole numbers"),
        ("seeds = [1, 1]", r"seeds = \[1, 1\]: each seed may stand once"),
        ('metric = "loss"', r"metric = 'loss': expected one of test_accuracy, best_test_accuracy"),
        ("metric = [1]", r"metric = \[1\]: expected one of test_accuracy"),
        ("paper = 1", r"\[base\], \[\[run\]\], seeds and metric only, found paper"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(ExperimentError, match=message):
        read(tmp_path, f'{line}\n[[run]]\nname = "a"')


def test_a_name_that_is_no_text_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match=r"name = \['a'\]: expected a text"):
        read(tmp_path, '[[run]]\nname = ["a"]')


@pytest.mark.parametrize(
    "paper",
    ["1", '{ accuracy = "high" }', "{ accuracy = nan }", f"{{ accuracy = 1{400 * '0'} }}", "{ accurate = 1 }"],
)
def test_bad_figures_of_the_paper_are_named(tmp_path: Path, paper: str) -> None:
    with pytest.raises(ExperimentError, match=r"\[\[run\]\] a: paper = .* expected numbers for accuracy, deviation"):
        read(tmp_path, f'[[run]]\nname = "a"\npaper = {paper}')


def test_table_1_has_every_row_of_the_paper() -> None:
    """Two sparsities, IID and not, the full model and three strategies with three mask ratios, three seeds."""
    for preset in ("table1-cifar10", "table1-speech", "table3-speech"):
        sweep = read_sweep(find_sweep(preset))
        rows = [row for row in sweep.rows if row.name not in ("dense", "recommended")]
        assert len(rows) == 2 * 2 * (1 + 3 * 3)
        assert all(row.paper.keys() == {"accuracy", "deviation", "size", "savings"} for row in rows)
        assert len(sweep.experiments()) == 3 * len(sweep.rows)
        keys = {
            (e.sparsity, e.alpha, e.uplink, e.mask_ratio, e.sparsity_distribution) for e in sweep.experiments().values()
        }
        assert len(keys) == len(sweep.rows)
    assert len(read_sweep(find_sweep("table2-fedadam")).rows) == 2 * 10
    assert len(read_sweep(find_sweep("table1-femnist")).rows) == 10 + 1


@pytest.mark.parametrize("preset", ["table1-cifar10", "table1-speech", "table1-femnist"])
def test_table_1_ends_with_dense_training_to_compare_times_with(preset: str) -> None:
    *_, dense = read_sweep(find_sweep(preset)).rows
    assert all((e.sparsity, e.activation_sparsity, e.uplink) == (0.0, 0.0, "full") for e in dense.experiments)
    assert dense.paper == {}


@pytest.mark.parametrize("preset", ["figure1", "figure2", "figure4"])
def test_the_papers_figures_are_run_with_three_seeds(preset: str) -> None:
    assert all([e.seed for e in row.experiments] == [1, 2, 3] for row in read_sweep(find_sweep(preset)).rows)


def test_what_is_compared_by_validation_is_validated() -> None:
    sweep = read_sweep(find_sweep("figure1"))
    assert sweep.metric == "validation_accuracy"
    assert all(e.validate_every and e.validation_fraction for e in sweep.experiments().values())


def test_a_folder_keeps_the_file_of_the_runs_in_it(tmp_path: Path) -> None:
    """The file may change in what the runs' folders do not depend on, and lose rows that were never run."""
    out = tmp_path / "out"
    out.mkdir()

    def keep(text: str) -> str:
        sweep = read(tmp_path, text)
        keep_sweep(out, tmp_path / "file.toml", sweep)
        return (out / "sweep.toml").read_text()

    both, a, b = ("".join(f'[[run]]\nname = "{name}"\n' for name in names) for names in ("ab", "a", "b"))
    assert keep(both) == both
    (out / "a").mkdir()
    (out / "a" / EXPERIMENT).touch()
    assert keep(f"# with a comment\n{a}") == f"# with a comment\n{a}"
    with pytest.raises(ResultsError, match=r"out holds runs of another file: a of its sweep\.toml, which .*file\.toml"):
        keep(b)
    assert (out / "sweep.toml").read_text() == f"# with a comment\n{a}"
    assert keep(f"seeds = [1]\n{both}") == f"seeds = [1]\n{both}"
    (out / "sweep.toml").write_text("damaged")
    assert keep(both) == both


def test_runs_with_several_seeds_belong_to_their_row(tmp_path: Path) -> None:
    keep_sweep(tmp_path, tmp_path / "file.toml", read(tmp_path, FILE))
    (tmp_path / "b-seed2").mkdir()
    (tmp_path / "b-seed2" / EXPERIMENT).touch()
    keep_sweep(tmp_path, tmp_path / "file.toml", read(tmp_path, FILE.replace("[1, 2]", "[1]")))
    with pytest.raises(ResultsError, match=r"b of its sweep\.toml"):
        keep_sweep(tmp_path, tmp_path / "file.toml", read(tmp_path, '[[run]]\nname = "other"'))
