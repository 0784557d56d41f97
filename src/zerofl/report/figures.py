"""A report's figures, as SVG: accuracy and loss, and the paper's Figures 1 to 6 where the runs have what they need.

Lines differ by colour, dashes and marker, so that they can be told apart in grey too.
"""

import io
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from zerofl.fl.records import MB
from zerofl.report.collect import Collection, ReportRow, Run
from zerofl.report.tables import STRATEGIES, setting, strategy
from zerofl.run.sweep import METRICS

# Of Okabe and Ito, told apart by all eyes; more lines than these take theirs from a colour map.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9", "#7F7F7F")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (8, 3)))
MARKERS = ("o", "s", "^", "v", "D", "x", "+", "*")
MARKERS_A_LINE = 8
HEAT_MAP_WEIGHTS = 400  # rows of a heat map: so many weights of a layer, at even steps
HEAT_MAP_LAYERS = slice(4, 10)  # Figure 3 shows layers 4 to 9
MASK_RATIOS = 4  # from so many on, Figure 4 has a line
STYLE: Any = {
    "svg.hashsalt": "zerofl", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "savefig.bbox": "tight",
    "text.parse_math": False,  # a name may have a $ in it
}  # fmt: skip
SEEDS = "With several seeds the line is the mean of those that have come so far, and the band their range."


class Figure(NamedTuple):
    """A heading, what is to be seen, and the picture as SVG."""

    heading: str
    caption: str
    svg: bytes


def figures(collection: Collection) -> list[Figure]:
    """All figures that can be made of these runs."""
    makers: Sequence[Callable[[Collection], Figure | None]] = (
        accuracy,
        loss,
        accuracy_by_traffic,
        frontier,
        by_mask_ratio,
        nonzero_ratios,
        overlaps,
        overlaps_by_layer,
    )
    found = [figure for make in makers if (figure := make(collection))]
    return found + [figure for row in collection.started if (figure := heat_maps(row))]


def accuracy(collection: Collection) -> Figure | None:
    """Accuracy over the rounds; with centralised rows it is Figure 1, and shows validation accuracy as that does."""
    central = any(setting(row.experiment) == "centralised" for row in collection.rows)
    validated = all(run.curve("validation_accuracy")[0] for row in collection.rows for run in row.runs)
    wanted = collection.metric == "validation_accuracy" or (central and validated)
    key = "validation_accuracy" if wanted else "test_accuracy"
    heading = "Figure 1: centralised and federated SWAT" if central else "Accuracy"
    return _over_rounds(collection, key, heading, f"{key.replace('_', ' ').capitalize()} (%)", 100.0)


def loss(collection: Collection) -> Figure | None:
    """Training loss over the rounds, the mean of the round's clients."""
    return _over_rounds(collection, "train_loss", "Loss", "Training loss of the round's clients", 1.0)


def accuracy_by_traffic(collection: Collection) -> Figure | None:
    """Test accuracy against all bytes so far, up and down."""
    heading, label = "Accuracy against total communication", "Test accuracy (%)"
    figure = _over_rounds(collection, "test_accuracy", heading, label, 100.0, by_traffic=True)
    caption = (
        "All bytes so far, up and down, on a logarithmic scale. The whole model goes down, so where little goes up the "
        "downlink is most of it. With several seeds the line is their mean."
    )
    return figure and figure._replace(caption=caption)


def frontier(collection: Collection) -> Figure | None:
    """Accuracy at the end against the bytes sent up, a point a row; a line joins those that no other row beats in both.

    None with fewer than three finished rows, or two data sets.
    """
    points = [
        (up.mean / MB, measured.mean * 100, (measured.deviation or 0.0) * 100, row.name)
        for row in collection.started
        if (measured := row.measured(collection.metric)) and (up := row.measured("uplink_bytes")) and up.mean
    ]
    if len(points) < 3 or len({row.experiment.dataset for row in collection.started}) > 1:
        return None
    points.sort(key=lambda point: (point[0], -point[1]))
    best = [point for i, point in enumerate(points) if all(point[1] > other[1] for other in points[:i])]
    with rc_context(STYLE):
        canvas, (axes,) = _panels(1)
        axes.step([x for x, *_ in best], [y for _, y, *_ in best], where="post", color="0.6", lw=1, zorder=0)
        for (x, y, deviation, name), look in zip(points, _looks(1, len(points)), strict=True):
            axes.errorbar(x, y, deviation or None, capsize=2, label=name, **look | {"ls": "none"})
        axes.set(xlabel="MB up, the whole run", xscale="log", ylabel=f"{METRICS[collection.metric].capitalize()} (%)")
        _plain_numbers(axes)
        _legend_below(axes)
        caption = (
            "Up and to the left is better; the grey line joins what no other row beats in both. Bars are the seeds' "
            "deviation."
        )
        return Figure("Accuracy against what is sent up", caption, _svg(canvas))


def by_mask_ratio(collection: Collection) -> Figure | None:
    """Figure 4: accuracy against the mask ratio, a line for each strategy, sparsity, data set and way of dealing it.

    A line has four mask ratios or more.
    """
    points: dict[tuple[str, float, str, str], list[tuple[float, float]]] = {}
    for row in collection.rows:
        e, measured = row.experiment, row.measured(collection.metric)
        if measured and strategy(e) not in ("dense", "full"):
            line = (strategy(e), e.sparsity, e.dataset, setting(e))
            points.setdefault(line, []).append((e.mask_ratio, measured.mean * 100))
    points = {
        line: sorted(values) for line, values in points.items() if len({ratio for ratio, _ in values}) >= MASK_RATIOS
    }
    if not points:
        return None
    with rc_context(STYLE):
        canvas = Canvas(figsize=(5, 3.8), layout="constrained")
        axes = canvas.subplots()
        for ((name, sparsity, dataset, deal), values), look in zip(points.items(), _looks(1, len(points)), strict=True):
            label = f"{STRATEGIES[name]}, {sparsity:.0%}, {dataset}, {deal}"
            axes.plot(*zip(*values, strict=True), label=label, **look)
        axes.set(xlabel="Mask ratio", ylabel=f"{METRICS[collection.metric].capitalize()} (%)")
        _legend_below(axes)
        return Figure("Figure 4: accuracy against the mask ratio", "", _svg(canvas))


def nonzero_ratios(collection: Collection) -> Figure | None:
    """Figure 2: the non-zero ratio of each sparse layer after the aggregation, where only top-K weights are sent."""
    rows = [row for row in collection.started if strategy(row.experiment) == "top_k_weights"]
    if not rows:
        return None
    with rc_context(STYLE):
        canvas, panels = _panels(len(rows))
        for axes, row in zip(panels, rows, strict=True):
            records = row.runs[0].rounds
            layers = list(records[0].nonzero_ratio)
            e = row.experiment
            for number, layer in enumerate(layers):
                shade = 0.85 * number / max(1, len(layers) - 1)
                values = [record.nonzero_ratio[layer] for record in records]
                rounds = [record.round for record in records]
                axes.plot(rounds, values, color=colormaps["viridis"](shade), ls=DASHES[number % 4], lw=1, label=layer)
            axes.axhline(1 - e.sparsity + e.mask_ratio, color="black", lw=0.8)
            axes.set(title=f"{row.name}: clients send {1 - e.sparsity + e.mask_ratio:.0%}")
            _round_axis(axes)
        panels[0].set_ylabel("Non-zero ratio")
        canvas.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7)
        caption = (
            "The fraction of a layer that is not zero in the aggregated model. The black line is what one client "
            "sends, which it would be if all clients sent the same positions."
        )
        return Figure("Figure 2: non-zero ratio after the aggregation", caption, _svg(canvas))


def overlaps(collection: Collection) -> Figure | None:
    """How far the positions that two clients send are the same, the mean over the layers."""
    rows = [row for row in collection.started if any(record.mask_overlap for record in row.runs[0].rounds)]
    if not rows:
        return None
    with rc_context(STYLE):
        canvas = Canvas(figsize=(6.4, 3.6), layout="constrained")
        axes = canvas.subplots()
        # A row without masks keeps its place, so that the others look here as in the curves of accuracy.
        looks = _looks(len(rows[0].runs[0].rounds), len(collection.started))
        for row, look in zip(collection.started, looks, strict=True):
            found = [(record.round, record.mask_overlap) for record in row.runs[0].rounds if record.mask_overlap]
            if not found:
                continue
            values = [float(np.mean(list(overlap.values()))) for _, overlap in found]
            axes.plot([round for round, _ in found], values, label=row.name, **look)
        axes.set(ylabel="Shared by two clients", ylim=(0, 1.05))  # a line at 1 is seen whole
        _round_axis(axes)
        canvas.legend(loc="outside right upper", fontsize=7)
        caption = "Of the positions that one client sends, the part that another sends too; the mean over the layers."
        return Figure("Overlap of the clients' masks", caption, _svg(canvas))


def overlaps_by_layer(collection: Collection) -> Figure | None:
    """The overlap of each sparse layer by its depth, the mean over the second half of the rounds (contribution 2)."""
    with rc_context(STYLE):
        canvas = Canvas(figsize=(6.4, 3.8), layout="constrained")
        axes = canvas.subplots()
        layers: list[str] = []
        for row, look in zip(collection.started, _looks(MARKERS_A_LINE, len(collection.started)), strict=True):
            records = [record.mask_overlap for record in row.runs[0].rounds if record.mask_overlap]
            if not records:
                continue
            late = records[len(records) // 2 :]
            layers = list(late[0])
            axes.plot([float(np.mean([record[layer] for record in late])) for layer in layers], label=row.name, **look)
        if not layers:
            return None
        axes.set(ylabel="Shared by two clients", ylim=(0, 1.05))
        axes.set_xticks(range(len(layers)), layers, rotation=90, fontsize=6)
        canvas.legend(loc="outside right upper", fontsize=7)
        caption = (
            "The same for each sparse layer, from the first to the last, the mean over the second half of the rounds. "
            "The paper says that the overlap decreases with depth."
        )
        return Figure("Overlap of the clients' masks by layer", caption, _svg(canvas))


def heat_maps(row: ReportRow) -> Figure | None:
    """Figures 3, 5 and 6: a layer's aggregated weights, flattened, at the rounds that were kept."""
    snapshots = row.runs[0].snapshots()
    if len(snapshots) < 2:
        return None
    rounds = list(snapshots)
    layers = list(snapshots[rounds[0]])
    chosen = layers[HEAT_MAP_LAYERS] if len(layers) >= HEAT_MAP_LAYERS.stop else layers
    with rc_context(STYLE | {"axes.grid": False}):
        canvas = Canvas(figsize=(10, 3.6), layout="constrained")
        panels = np.atleast_1d(canvas.subplots(1, len(chosen), sharex=True))
        for axes, layer in zip(panels, chosen, strict=True):
            size = snapshots[rounds[0]][layer].numel()
            at = torch.linspace(0, size - 1, min(HEAT_MAP_WEIGHTS, size)).long()
            picture = torch.stack([snapshots[round][layer].flatten()[at].abs() for round in rounds], dim=1).numpy()
            largest = float(np.quantile(picture[picture > 0], 0.95)) if (picture > 0).any() else 1.0
            axes.imshow(picture, aspect="auto", cmap="gray_r", vmin=0, vmax=largest, interpolation="nearest")
            axes.set_title(layer, fontsize=8)
            axes.set_yticks([])
            axes.set_xticks(range(len(rounds)), [str(round) for round in rounds], rotation=90, fontsize=6)
        panels[0].set_ylabel(f"{len(at)} weights of each layer")
        canvas.supxlabel("Round", fontsize=9)
        caption = "Each line of pixels is one weight: white is zero, dark is large. A weight that stays is a dark line."
        return Figure(f"Figures 3, 5 and 6: where the weights are, {row.name}", caption, _svg(canvas))


def _over_rounds(
    collection: Collection, key: str, heading: str, label: str, factor: float, by_traffic: bool = False
) -> Figure | None:
    """Curves of a figure, a panel for each data set, sparsity and way of dealing; dense ones in all of them.

    They run over the rounds, or with `by_traffic` over the bytes so far.
    """
    rows = [row for row in collection.started if any(run.curve(key)[0] for run in row.runs)]
    if not rows:
        return None
    central = [row for row in rows if setting(row.experiment) == "centralised"]

    def panel_of(row: ReportRow) -> tuple[Any, ...]:
        e = row.experiment
        return (e.dataset, e.sparsity) if central else (e.dataset, e.sparsity, setting(e))

    own = [row for row in rows if strategy(row.experiment) != "dense"] or rows
    groups: dict[tuple[Any, ...], list[ReportRow]] = {}
    for row in own:
        groups.setdefault(panel_of(row), []).append(row)
    for row in rows:
        if row not in own:
            same = [panel for panel in groups if (panel[0], *panel[2:]) == (panel_of(row)[0], *panel_of(row)[2:])]
            for panel in same:
                groups[panel].append(row)
    with rc_context(STYLE):
        canvas, panels = _panels(len(groups))
        for axes, (panel, members) in zip(panels, groups.items(), strict=True):
            for row, look in zip(members, _looks(len(members[0].runs[0].rounds), len(members)), strict=True):
                _mean_curve(axes, row.runs, key, factor, row.name, look, by_traffic)
            axes.set(title=_panel_title(panel, {strategy(row.experiment) == "dense" for row in members}))
            if by_traffic:
                axes.set(xlabel="MB up and down", xscale="log")
                _plain_numbers(axes)
            else:
                _round_axis(axes)
            _legend_below(axes)
        panels[0].set_ylabel(label)
        return Figure(heading, SEEDS, _svg(canvas))


def _panel_title(panel: tuple[Any, ...], dense: set[bool]) -> str:
    """`cifar10, NIID, 95% sparse and dense`: of the data, and which kinds of rows are in the panel."""
    kinds = " and ".join([f"{panel[1]:.0%} sparse"] * (False in dense) + ["dense"] * (True in dense))
    return ", ".join([panel[0], *panel[2:], kinds])


def _mean_curve(
    axes: Axes, runs: list[Run], key: str, factor: float, label: str, look: dict[str, Any], by_traffic: bool
) -> None:
    curves = [dict(zip(*run.curve(key), strict=True)) for run in runs]
    rounds = sorted(set().union(*curves))
    values = [np.array([curve[round] for curve in curves if round in curve]) * factor for round in rounds]
    look = look | {"markevery": max(1, len(rounds) // MARKERS_A_LINE)}
    places: list[float] = list(map(float, rounds))
    if by_traffic:
        traffic = [run.traffic() for run in runs]
        places = [float(np.mean([sums[round] for sums in traffic if round in sums])) / MB for round in rounds]
    axes.plot(places, [seeds.mean() for seeds in values], label=label, **look)
    if len(runs) > 1 and not by_traffic:
        low, high = [seeds.min() for seeds in values], [seeds.max() for seeds in values]
        axes.fill_between(rounds, low, high, color=look["color"], alpha=0.15, lw=0)


def _legend_below(axes: Axes) -> None:
    """The legend under the panel, where it hides no curve."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, fontsize=7, frameon=False)


def _plain_numbers(axes: Axes) -> None:
    """A logarithmic axis with numbers as people write them."""
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _round_axis(axes: Axes) -> None:
    axes.set_xlabel("Round")
    axes.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10], integer=True))


def _looks(points: int, lines: int) -> list[dict[str, Any]]:
    """Colour, dashes and marker of each line; no two have the same colour."""
    every = max(1, points // MARKERS_A_LINE)
    colours = COLOURS if lines <= len(COLOURS) else [colormaps["turbo"](place) for place in np.linspace(0, 0.95, lines)]
    return [
        {"color": colours[i], "ls": DASHES[i % 7], "marker": MARKERS[i % 8], "ms": 4, "lw": 1.2, "markevery": every}
        for i in range(lines)
    ]


def _panels(count: int) -> tuple[Canvas, list[Axes]]:
    columns = min(count, 3)
    lines = -(-count // columns)
    canvas = Canvas(figsize=(max(5.5, 4 * columns), 3.6 * lines), layout="constrained")
    grid = canvas.subplots(lines, columns, squeeze=False).flatten()
    for unused in grid[count:]:
        unused.set_axis_off()
    return canvas, list(grid[:count])


def _svg(canvas: Canvas) -> bytes:
    file = io.BytesIO()
    canvas.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()
