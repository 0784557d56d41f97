"""A report's tables, as plain cells: the page, the Markdown and the CSV are made of the same."""

from itertools import pairwise
from statistics import mean

from zerofl.experiment import Experiment
from zerofl.fl.energy import MEASURED, NOT_COVERED
from zerofl.fl.records import Summary
from zerofl.report.cells import Beside, Cell, Table
from zerofl.report.collect import Collection, ReportRow
from zerofl.report.sizes import counted_size, downlink_size, measured_size, savings, sizes_note
from zerofl.run.sweep import METRICS

STRATEGIES = {
    "dense": "Dense FedAvg",
    "full": "Full Model (SWAT)",
    "top_k_weights": "Top-K-W.",
    "diff_on_top_k_weights": "Diff. Top-K-W.",
    "top_k_weights_diff": "Top-K-W. Diff",
}
"""The paper's names of the columns of Table 1."""

BEYOND = (
    "sparsity_distribution",
    "powerpropagation",
    "average_decay",
    "momentum",
    "uplink_values",
    "downlink_values",
    "storage",
)
"""Keys that go beyond the paper: rows that set them are not in its tables and Figure 4, nor are those of other server
optimisers than its two."""

SIZE_COLUMNS = ["MB an update", "MB down for it", "The paper's count, MB", "Savings"]


def strategy(experiment: Experiment) -> str:
    """The key into STRATEGIES."""
    return "dense" if experiment.sparsity == 0 and not experiment.activation_sparsity else experiment.uplink


def is_beyond(experiment: Experiment) -> bool:
    """Whether a row goes beyond the paper (`BEYOND`)."""
    plain = Experiment()
    return experiment.server_optimizer not in ("fedavg", "fedadam") or any(
        getattr(experiment, key) != getattr(plain, key) for key in BEYOND
    )


def setting(experiment: Experiment) -> str:
    """How the data is dealt, in the paper's words."""
    if experiment.clients == 1:
        return "centralised"
    if experiment.partition != "lda":
        return experiment.partition
    return "IID" if experiment.alpha >= 100 else "NIID"


def paper_table(collection: Collection) -> Table | None:
    """The layout of Tables 1 to 3: sparsity and mask ratio down, strategies across, measured above the paper's.

    Without rows that go beyond the paper. None if two of the others would meet in a cell, as those of Figure 1 do.
    """
    cells: dict[tuple[tuple[str, float, float | None], tuple[str, str]], ReportRow] = {}
    for row in collection.rows:
        e = row.experiment
        if is_beyond(e):
            continue
        whole = strategy(e) in ("dense", "full")
        key = (e.dataset, e.sparsity, None if whole else e.mask_ratio), (strategy(e), setting(e))
        if key in cells:
            return None
        cells[key] = row
    lines = sorted({line for line, _ in cells}, key=lambda x: (x[0], x[1], -1.0 if x[2] is None else x[2]))
    found = {column for _, column in cells}
    deals = ("IID", "NIID", "natural", "node", "centralised")
    columns = [(s, deal) for s in STRATEGIES for deal in deals if (s, deal) in found]
    several = len({dataset for dataset, _, _ in lines}) > 1  # else a column would say the same on every line
    rows: list[list[Cell]] = []
    for line in lines:
        dataset, sparsity, mask_ratio = line
        members = [cells[line, column] for column in columns if (line, column) in cells]
        texts = [_beside(cells.get((line, column)), collection.metric) for column in columns]
        ratio = "—" if mask_ratio is None else f"{mask_ratio:g}"
        rows.append([*([dataset] if several else []), f"{sparsity:.0%}", ratio, *texts, *_sizes(members)])
    strategies = [f"{STRATEGIES[s]} {deal}" for s, deal in columns]
    metric = METRICS[collection.metric]
    return Table(
        f"{metric.split(' ', 1)[1].capitalize()} as the paper's table has it",
        [*(["Dataset"] if several else []), "Sparsity", "Mask ratio", *strategies, *SIZE_COLUMNS],
        rows,
        f"The {metric} in percent, measured; in brackets the paper's. {sizes_note(collection.rows)}",
    )


def row_table(collection: Collection) -> Table:
    """Every row of the file with what was measured, and the paper's figure where it has one."""
    keys = {"Final accuracy %": "test_accuracy", "Best accuracy %": "best_test_accuracy"}
    if collection.metric == "validation_accuracy":
        keys["Validation accuracy %"] = "validation_accuracy"
    rows: list[list[Cell]] = []
    for row in collection.rows:
        measured = [row.measured(key) for key in keys.values()]
        shown, paper = row.measured(collection.metric), row.paper.get("accuracy")
        rows.append(
            [
                row.name,
                row.seeds(),
                row.unfinished(),
                *(figure.text(2, 100) if figure else "" for figure in measured),
                _paper_accuracy(row),
                f"{shown.mean * 100 - paper:+.2f}" if shown and paper is not None else "",
                *_sizes([row]),
            ]
        )
    columns = ["Row", "Seeds finished", "Not finished", *keys, "Paper %", "Difference", *SIZE_COLUMNS]
    note = (
        "All rows of the file and all their seeds; figures are of the finished ones. The paper's is the "
        f"{METRICS[collection.metric]}. {sizes_note(collection.rows)}"
    )
    return Table("Every row", columns, rows, note)


def time_table(collection: Collection) -> Table:
    """Local training: seconds and joules for a thousand samples, against a dense row of the same model, and arithmetic.

    CPU seconds are compared where both rows have them, as other work on the machine does not count there. Columns of
    energy are there if a row has any.
    """
    costs = {row.name: {key: _a_thousand(row, key) for key in (*CLOCKS, *ENERGIES)} for row in collection.started}
    with_energy = [key for key in ENERGIES if any(cost[key] is not None for cost in costs.values())]
    dense = {
        _trained(row.experiment): row for row in reversed(collection.started) if strategy(row.experiment) == "dense"
    }
    rows: list[list[Cell]] = []
    for row in collection.started:
        flops = next((summary.flops_a_sample for summary in row.summaries if summary.flops_a_sample), None)
        mine, beside = costs[row.name], dense.get(_trained(row.experiment))
        of_dense = costs[beside.name] if beside else {}
        if beside and beside.experiment.watts_per_core != row.experiment.watts_per_core:
            of_dense = of_dense | {"train_joules_estimate": None}  # their ratio would be that of the watts
        joules = next((f"{mine[key]:.1f}{word}" for key, word in ENERGIES.items() if mine[key] is not None), "")
        realised = row.runs[0].curve("realised_sparsity")[1]
        rows.append(
            [
                row.name,
                *("" if (value := mine[key]) is None else f"{value:.2f}" for key in CLOCKS),
                _ratio(of_dense, mine, CLOCKS),
                *([joules, _ratio(of_dense, mine, ENERGIES)] if with_energy else []),
                f"{flops['dense'] / 1e6:.0f}" if flops else "",
                f"{flops['sparse'] / 1e6:.0f}" if flops else "",
                f"{sum(realised) / len(realised):.2%}{_when_counted(row)}" if realised else "",
            ]
        )
    columns = [
        "Row",
        "CPU s for 1,000 samples",
        "Wall s for 1,000 samples",
        "Dense / this",
        *(["J for 1,000 samples", "J, dense / this"] if with_energy else []),
        "MFLOP a sample, dense",
        "MFLOP a sample, sparse",
        "Realised sparsity",
    ]
    note = (
        "Time on the clients in these runs. CPU seconds are those of all threads together, also of those that wait for "
        "another: with several threads and other work beside them that can be most of it, so such rows compare only "
        "with threads = 1. Wall seconds count whatever else the machine did: a ratio marked (wall), of rows recorded "
        "without CPU seconds or on a GPU, compares only "
        "if nothing ran beside them. zerofl bench step measures a step alone. The arithmetic is that of convolutions "
        "and linear layers, forward and backward. The realised sparsity is that of the last forward pass of each "
        "client's training; records of earlier versions have instead what the last threshold would have zeroed after "
        "the last step, which no pass used."
    )
    if with_energy:
        kinds = {
            "train_joules": f"Joules are {MEASURED}.",
            "train_joules_estimate": "Joules marked (estimate) were not measured: CPU seconds x watts_per_core.",
        }
        note = " ".join([note, *(kinds[key] for key in with_energy), f"Of joules {NOT_COVERED}."])
    return Table("Local training", columns, rows, note)


def _when_counted(row: ReportRow) -> str:
    """What stands behind a realised sparsity of an earlier version, whose records have no refused bytes either."""
    return " (after the last step)" if row.runs[0].rounds[0].refused_bytes is None else ""


def _ratio(dense: dict[str, float | None], mine: dict[str, float | None], measures: dict[str, str]) -> str:
    """How many times as much the dense row takes, by the best of CLOCKS or ENERGIES that both have."""
    for key, word in measures.items():
        of_dense, of_mine = dense.get(key), mine[key]
        if of_dense and of_mine:
            return f"{of_dense / of_mine:.2f}x{word}"
    return ""


def _trained(experiment: Experiment) -> tuple[object, ...]:
    """What has to be the same for times to be compared."""
    e = experiment
    return e.dataset, e.model, e.width, e.batch_size, e.threads, e.device, e.precision


CLOCKS = {"train_cpu_seconds": "", "train_seconds": " (wall)"}
"""The records' seconds of training, the better measure first, with what stands behind a ratio of them."""

ENERGIES = {"train_joules": "", "train_joules_estimate": " (estimate)"}
"""The same of their joules."""


def _a_thousand(row: ReportRow, key: str) -> float | None:
    """One of CLOCKS or ENERGIES for 1,000 samples; None where a round has it not, or the CPU is not what trains."""
    if key == "train_cpu_seconds" and row.experiment.device != "cpu":
        return None
    records = [record for run in row.runs for record in run.rounds]
    if not records or not all(getattr(record, key) and record.examples is not None for record in records):
        return None
    examples = sum(record.examples or 0 for record in records) * row.experiment.epochs
    return float(1000 * sum(getattr(record, key) for record in records) / examples) if examples else None


def traffic_table(collection: Collection) -> Table | None:
    """What went up and down in each finished row, the mean over its seeds; None without a finished row."""
    rows: list[list[Cell]] = []
    for row in collection.started:
        if not row.summaries:
            continue
        up, down = (row.measured(key) for key in ("uplink_bytes", "downlink_bytes"))
        both = [summary.uplink_bytes + summary.downlink_bytes for summary in row.summaries]
        full = sum(summary.full_model_bytes * summary.updates for summary in row.summaries)
        refused = row.measured("refused_bytes")
        rows.append(
            [
                row.name,
                up.text(1, 1e-6) if up else "",
                down.text(1, 1e-6) if down else "",
                f"{sum(both) / len(both) / 1e6:.1f}",
                refused.text(1, 1e-6) if refused else "",
                f"{2 * full / sum(both):.1f}x",
            ]
        )
    if not rows:
        return None
    columns = ["Row", "Uplink MB", "Downlink MB", "Both MB", "Refused MB", "Savings, both ways"]
    note = (
        "MB of 10^6 bytes of the whole run, the mean over the finished seeds. The model goes down to every client of a "
        "round, and once more where clients validate. Savings, both ways, are against the model's "
        "numbers as they are, up and down once for each update. Refused are payloads that were no update."
    )
    return Table("Total communication", columns, rows, note)


def settings_table(collection: Collection) -> Table:
    """The settings that differ between the rows that were run, and those that all share."""
    values = [vars(row.experiment) for row in collection.started]
    keys = [key for key in values[0] if key not in ("name", "seed", "root")]
    shared = [key for key in keys if len({str(v[key]) for v in values}) == 1]
    differing = [key for key in keys if key not in shared]
    rows: list[list[Cell]] = [
        [row.name, *(str(getattr(row.experiment, key)) for key in differing)] for row in collection.started
    ]
    note = "All rows: " + ", ".join(f"{key} = {values[0][key]}" for key in shared)
    return Table("Settings", ["Row", *differing], rows, note)


def origin_table(collection: Collection) -> Table:
    """Where the figures come from: machine, versions, threads, data."""
    origins: dict[tuple[str, str, str, str, str], list[str]] = {}
    for row in collection.rows:
        for run in row.runs:
            if s := run.summary:
                versions = ", ".join(f"{name} {version}" for name, version in s.versions.items())
                key = (s.machine, str(s.threads), versions, _code(s), s.data_sha256 or "")
                origins.setdefault(key, []).append(run.experiment.name)
    rows: list[list[Cell]] = [[*key, ", ".join(names)] for key, names in origins.items()]
    return Table("Machine, versions and data", ["Machine", "Threads", "Versions", "Code", "Data SHA-256", "Runs"], rows)


def _code(summary: Summary) -> str:
    """The hashes and the commit of the code, those of a resumed run's earlier rounds among them."""
    values = [[value] if isinstance(value, str) else value for value in (summary.code or {}).values()]
    return ", ".join(text for texts in values for text in texts) or "not recorded"


def persistence_table(collection: Collection) -> Table | None:
    """Of a layer's non-zero positions at a kept round, the part that is non-zero at the next, and by chance."""
    rows: list[list[Cell]] = []
    for row in collection.started:
        snapshots, every = row.runs[0].snapshots(), row.experiment.snapshot_every
        if len(snapshots) < 2 or strategy(row.experiment) != "top_k_weights":
            continue
        # The last round is kept in any case, and may follow the one before it sooner.
        pairs = [(a, b) for a, b in pairwise(snapshots) if b - a == every]
        for layer in snapshots[min(snapshots)]:
            masks = {round: state[layer] != 0 for round, state in snapshots.items()}
            first, last = masks[min(masks)], masks[max(masks)]
            kept = [float((masks[a] & masks[b]).sum() / masks[a].sum()) for a, b in pairs if masks[a].any()]
            whole = float((first & last).sum() / first.sum()) if first.any() else 0.0
            chance = float(last.float().mean())
            stay = f"{mean(kept):.1%}" if kept else ""
            rows.append([row.name, layer, str(every), stay, f"{whole:.1%}", f"{chance:.1%}"])
    if not rows:
        return None
    columns = ["Row", "Layer", "Kept every", "Stay until the next", "Stay from first to last", "By chance"]
    note = (
        "Of the non-zero positions at a kept round, how many are non-zero at the next one, so many rounds later, and "
        "of those at the first kept round how many are at the last."
    )
    return Table("Do the non-zero positions stay?", columns, rows, note)


def tables(collection: Collection) -> list[Table]:
    """All of a folder's tables, the most important first."""
    found = [
        paper_table(collection),
        row_table(collection),
        traffic_table(collection),
        time_table(collection),
        settings_table(collection),
        origin_table(collection),
        persistence_table(collection),
    ]
    return [table for table in found if table is not None]


def _beside(row: ReportRow | None, metric: str) -> Cell:
    if row is None:
        return ""
    measured = row.measured(metric)
    text = measured.text(2, 100) if measured else row.furthest()
    if measured and measured.seeds < len(row.experiments):
        text += f"\n{measured.seeds} of {len(row.experiments)} seeds"
    return Beside(text, _paper_accuracy(row))


def _sizes(rows: list[ReportRow]) -> list[Cell]:
    return [measured_size(rows), downlink_size(rows), counted_size(rows), savings(rows)]


def _paper_accuracy(row: ReportRow) -> str:
    if "accuracy" not in row.paper:
        return ""
    deviation = f" ± {row.paper['deviation']:.2f}" if "deviation" in row.paper else ""
    return f"{row.paper['accuracy']:.2f}{deviation}"
