"""A report's tables, as plain cells: the page, the Markdown and the CSV are made of the same."""

import csv
import io
from collections.abc import Iterable
from typing import Any, NamedTuple

from zerofl.experiment import Experiment
from zerofl.report.collect import Collection, ReportRow

MB = 1e6

STRATEGIES = {
    "dense": "Dense FedAvg",
    "full": "Full Model (SWAT)",
    "top_k_weights": "Top-K-W.",
    "diff_on_top_k_weights": "Diff. Top-K-W.",
    "top_k_weights_diff": "Top-K-W. Diff",
}
"""The paper's names of the columns of Table 1."""


class Table(NamedTuple):
    """A heading, the columns' names, the rows of cells, and a word about them."""

    heading: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""


def strategy(experiment: Experiment) -> str:
    """The key into STRATEGIES."""
    return "dense" if experiment.sparsity == 0 and not experiment.activation_sparsity else experiment.uplink


def setting(experiment: Experiment) -> str:
    """How the data is dealt, in the paper's words."""
    if experiment.clients == 1:
        return "centralised"
    if experiment.partition == "natural":
        return "natural"
    return "IID" if experiment.alpha >= 100 else "NIID"


def paper_table(collection: Collection) -> Table | None:
    """The layout of Tables 1 to 3: sparsity and mask ratio down, strategies across, measured above the paper's.

    None if two rows of the file would meet in a cell, as those of Figure 1 do.
    """
    cells: dict[tuple[tuple[str, float, float | None], tuple[str, str]], ReportRow] = {}
    for row in collection.rows:
        e = row.experiment
        whole = strategy(e) in ("dense", "full")
        key = (e.dataset, e.sparsity, None if whole else e.mask_ratio), (strategy(e), setting(e))
        if key in cells:
            return None
        cells[key] = row
    lines = sorted({line for line, _ in cells}, key=lambda x: (x[0], x[1], -1.0 if x[2] is None else x[2]))
    found = {column for _, column in cells}
    columns = [
        (s, deal) for s in STRATEGIES for deal in ("IID", "NIID", "natural", "centralised") if (s, deal) in found
    ]
    rows = []
    for line in lines:
        dataset, sparsity, mask_ratio = line
        members = [cells[line, column] for column in columns if (line, column) in cells]
        texts = [_beside(cells.get((line, column)), collection.metric) for column in columns]
        ratio = "—" if mask_ratio is None else f"{mask_ratio:g}"
        rows.append([dataset, f"{sparsity:.0%}", ratio, *texts, _bytes(members), _savings(members)])
    heads = [f"{STRATEGIES[s]} {deal}" for s, deal in columns]
    metric = "highest" if collection.metric.startswith("best") else "final"
    return Table(
        "Test accuracy as the paper's table has it",
        ["Dataset", "Sparsity", "Mask ratio", *heads, "MB an update", "Savings"],
        rows,
        f"The {metric} test accuracy in percent, measured; in brackets the paper's. MB are 10^6 bytes, measured on the "
        "wire; in brackets the paper's own, which are 1,024,000 bytes of its estimate. Savings are against sending the "
        "model's numbers as they are.",
    )


def row_table(collection: Collection) -> Table:
    """Every row of the file with what was measured, and the paper's figure where it has one."""
    rows = []
    for row in collection.rows:
        accuracy, best = row.measured("test_accuracy"), row.measured("best_test_accuracy")
        shown = accuracy if collection.metric == "test_accuracy" else best
        paper = row.paper.get("accuracy")
        done = min(len(run.rounds) for run in row.runs)
        rows.append(
            [
                row.name,
                str(sum(bool(run.summary) for run in row.runs)),
                f"{done} of {row.experiment.rounds}",
                accuracy.text(2, 100) if accuracy else "",
                best.text(2, 100) if best else "",
                _paper_accuracy(row),
                f"{shown.mean * 100 - paper:+.2f}" if shown and paper is not None else "",
                _bytes([row]),
                _savings([row]),
            ]
        )
    columns = ["Row", "Seeds", "Rounds", "Final accuracy %", "Best accuracy %", "Paper %", "Difference",
               "MB an update", "Savings"]  # fmt: skip
    return Table("Every row", columns, rows, "A row that is not finished has no accuracy yet.")


def time_table(collection: Collection) -> Table:
    """Local training: seconds for a thousand samples, against the dense row if there is one, and the arithmetic."""
    seconds = {row.name: s for row in collection.rows if (s := _seconds_a_thousand(row)) is not None}
    dense = next((seconds.get(r.name) for r in collection.rows if strategy(r.experiment) == "dense"), None)
    rows = []
    for row in collection.rows:
        flops = next((run.summary["flops_a_sample"] for run in row.runs if "flops_a_sample" in run.summary), None)
        mine = seconds.get(row.name)
        realised = row.runs[0].curve("realised_sparsity")[1]
        rows.append(
            [
                row.name,
                f"{mine:.2f}" if mine is not None else "",
                f"{dense / mine:.2f}x" if dense and mine else "",
                f"{flops['dense'] / 1e6:.0f}" if flops else "",
                f"{flops['sparse'] / 1e6:.0f}" if flops else "",
                f"{sum(realised) / len(realised):.2%}" if realised else "",
            ]
        )
    columns = ["Row", "s for 1,000 samples", "Dense / this", "MFLOP a sample, dense", "MFLOP a sample, sparse",
               "Realised sparsity"]  # fmt: skip
    return Table(
        "Local training",
        columns,
        rows,
        "Time on the clients as it was in these runs, all else on the machine included; zerofl bench step measures it "
        "alone. The arithmetic is that of convolutions and linear layers, forward and backward.",
    )


def _seconds_a_thousand(row: ReportRow) -> float | None:
    records = [record for run in row.runs for record in run.rounds if record.get("train_seconds")]
    examples = sum(record["examples"] for record in records) * row.experiment.epochs
    return 1000 * sum(record["train_seconds"] for record in records) / examples if examples else None


def settings_table(collection: Collection) -> Table:
    """The settings that differ between the rows, and those that all share."""
    values = [vars(row.experiment) for row in collection.rows]
    keys = [key for key in values[0] if key not in ("name", "seed", "root")]
    shared = [key for key in keys if len({str(v[key]) for v in values}) == 1]
    differing = [key for key in keys if key not in shared]
    rows = [[row.name, *(str(getattr(row.experiment, key)) for key in differing)] for row in collection.rows]
    note = "All rows: " + ", ".join(f"{key} = {values[0][key]}" for key in shared)
    return Table("Settings", ["Row", *differing], rows, note)


def origin_table(collection: Collection) -> Table:
    """Where the figures come from: machine, versions, threads, data."""
    origins: dict[tuple[str, str, str, str], list[str]] = {}
    for row in collection.rows:
        for run in row.runs:
            if s := run.summary:
                versions = ", ".join(f"{name} {version}" for name, version in s["versions"].items())
                key = (s["machine"], str(s["threads"]), versions, s.get("data_sha256", ""))
                origins.setdefault(key, []).append(run.experiment.name)
    rows = [[*key, ", ".join(names)] for key, names in origins.items()]
    return Table("Machine, versions and data", ["Machine", "Threads", "Versions", "Data SHA-256", "Runs"], rows)


def tables(collection: Collection) -> list[Table]:
    """All of a folder's tables, the most important first."""
    found = [paper_table(collection), row_table(collection), time_table(collection), settings_table(collection)]
    return [table for table in [*found, origin_table(collection)] if table is not None]


def markdown(table: Table) -> str:
    """A table as Markdown."""
    lines = [table.columns, ["---"] * len(table.columns), *table.rows]
    body = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return f"### {table.heading}\n\n{body}\n" + (f"\n{table.note}\n" if table.note else "")


def as_csv(named: Iterable[tuple[str, Table]]) -> str:
    """Tables one below the other, each line opening with the folder's name and the table's heading."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for name, table in named:
        writer.writerow(["folder", "table", *table.columns])
        writer.writerows([name, table.heading, *row] for row in table.rows)
    return text.getvalue()


def _beside(row: ReportRow | None, metric: str) -> str:
    if row is None:
        return ""
    measured = row.measured(metric)
    text = measured.text(2, 100) if measured else "not finished"
    return f"{text} ({paper})" if (paper := _paper_accuracy(row)) else text


def _paper_accuracy(row: ReportRow) -> str:
    if "accuracy" not in row.paper:
        return ""
    deviation = f" ± {row.paper['deviation']:.2f}" if "deviation" in row.paper else ""
    return f"{row.paper['accuracy']:.2f}{deviation}"


def _bytes(rows: list[ReportRow]) -> str:
    """MB an update in the finished runs, from the row that sends least to the one that sends most; the paper's."""
    measured = [sum(s["uplink_bytes"] for s in of) / sum(s["updates"] for s in of) / MB for of in _summaries(rows)]
    return _range(measured, 2, "", _one_of(rows, "size"))


def _savings(rows: list[ReportRow]) -> str:
    measured = [
        sum(s["full_model_bytes"] * s["updates"] for s in of) / sum(s["uplink_bytes"] for s in of)
        for of in _summaries(rows)
    ]
    return _range(measured, 1, "x", _one_of(rows, "savings"))


def _summaries(rows: list[ReportRow]) -> list[list[dict[str, Any]]]:
    """The summaries of each row that has a finished run."""
    found = [[run.summary for run in row.runs if run.summary] for row in rows]
    return [summaries for summaries in found if summaries]


def _range(values: list[float], digits: int, unit: str, paper: str) -> str:
    texts = list(dict.fromkeys(f"{value:.{digits}f}{unit}" for value in sorted(values)))
    shown = [texts[0], texts[-1]] if len(texts) > 1 else texts
    beside = f"({paper}{unit})" if paper else ""
    return " ".join(part for part in (" to ".join(shown), beside) if part)


def _one_of(rows: list[ReportRow], key: str) -> str:
    values = {f"{row.paper[key]:.1f}" for row in rows if key in row.paper}
    return values.pop() if len(values) == 1 else ""
