"""A report's figures, as SVG: accuracy, loss, bytes, and the paper's Figures 1 to 6 where runs have what they need."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from zerofl.fl.records import MB
from zerofl.report import drawing
from zerofl.report.collect import Collection, ReportRow, Run
from zerofl.report.drawing import Figure
from zerofl.report.masks import heat_maps, nonzero_ratios, overlaps, overlaps_by_layer
from zerofl.report.tables import STRATEGIES, is_beyond, setting, strategy
from zerofl.run.sweep import METRICS

MASK_RATIOS = 4  # from so many on, Figure 4 has a line
SEEDS = "With several seeds the line is the mean of those that have come so far, and the band their range."


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
    """Accuracy at the end against the bytes sent up, and up and down, a point a row.

    A line joins the rows that no other one beats in both. None with fewer than three finished rows, or two data sets.
    """
    ends = [
        (row.name, measured, up.mean / MB, down.mean / MB)
        for row in collection.started
        if (measured := row.measured(collection.metric))
        and (up := row.measured("uplink_bytes"))
        and (down := row.measured("downlink_bytes"))
        and up.mean
    ]
    if len(ends) < 3 or len({row.experiment.dataset for row in collection.started}) > 1:
        return None
    looks = drawing.looks(1, len(ends))
    with rc_context(drawing.STYLE):
        canvas, panels = drawing.panels(2)
        places = [[up for *_, up, _ in ends], [up + down for *_, up, down in ends]]
        for axes, label, at in zip(panels, ("MB up, the whole run", "MB up and down"), places, strict=True):
            best = _unbeaten([(x, 100 * measured.mean) for x, (_, measured, *_) in zip(at, ends, strict=True)])
            axes.step([x for x, _ in best], [y for _, y in best], where="post", color="0.6", lw=1, zorder=0)
            for x, (name, measured, *_), look in zip(at, ends, looks, strict=True):
                bar = 100 * (measured.deviation or 0.0) or None
                axes.errorbar(x, 100 * measured.mean, bar, capsize=2, label=name, **look | {"ls": "none"})
            axes.set(xlabel=label, xscale="log")
            drawing.plain_numbers(axes)
        panels[0].set_ylabel(f"{METRICS[collection.metric].capitalize()} (%)")
        canvas.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7)
        caption = (
            "Up and to the left is better; the grey lines join what no other row beats in both. Bars are the seeds' "
            "deviation."
        )
        return Figure("Accuracy against what is sent", caption, drawing.svg(canvas))


def _unbeaten(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (bytes, accuracy) those that no other beats in both, from the fewest bytes on."""
    points = sorted(points, key=lambda point: (point[0], -point[1]))
    return [point for i, point in enumerate(points) if all(point[1] > other[1] for other in points[:i])]


def by_mask_ratio(collection: Collection) -> Figure | None:
    """Figure 4: accuracy against the mask ratio, a line for each strategy, sparsity, data set and way of dealing it.

    A line has four mask ratios or more.
    """
    points: dict[tuple[str, float, str, str], list[tuple[float, float]]] = {}
    for row in collection.rows:
        e, measured = row.experiment, row.measured(collection.metric)
        if measured and strategy(e) not in ("dense", "full") and not is_beyond(e):
            line = (strategy(e), e.sparsity, e.dataset, setting(e))
            points.setdefault(line, []).append((e.mask_ratio, measured.mean * 100))
    points = {
        line: sorted(values) for line, values in points.items() if len({ratio for ratio, _ in values}) >= MASK_RATIOS
    }
    if not points:
        return None
    with rc_context(drawing.STYLE):
        canvas = Canvas(figsize=(5, 3.8), layout="constrained")
        axes = canvas.subplots()
        looks = drawing.looks(1, len(points))
        for ((name, sparsity, dataset, deal), values), look in zip(points.items(), looks, strict=True):
            label = f"{STRATEGIES[name]}, {sparsity:.0%}, {dataset}, {deal}"
            axes.plot(*zip(*values, strict=True), label=label, **look)
        axes.set(xlabel="Mask ratio", ylabel=f"{METRICS[collection.metric].capitalize()} (%)")
        drawing.legend_below(axes)
        return Figure("Figure 4: accuracy against the mask ratio", "", drawing.svg(canvas))


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
            for panel in same or [panel_of(row)]:  # one of its own where no sparse row has its data
                groups.setdefault(panel, []).append(row)
    with rc_context(drawing.STYLE):
        canvas, panels = drawing.panels(len(groups))
        for axes in panels[1:] if central else ():
            axes.sharey(panels[0])  # Figure 1 compares sparsities
        for axes, (panel, members) in zip(panels, groups.items(), strict=True):
            for row, look in zip(members, drawing.looks(len(members[0].runs[0].rounds), len(members)), strict=True):
                _mean_curve(axes, row.runs, key, factor, row.name, look, by_traffic)
            axes.set(title=_panel_title(panel, {strategy(row.experiment) == "dense" for row in members}))
            if by_traffic:
                axes.set(xlabel="MB up and down", xscale="log")
                drawing.plain_numbers(axes)
            else:
                drawing.round_axis(axes)
            drawing.legend_below(axes)
        panels[0].set_ylabel(label)
        return Figure(heading, SEEDS, drawing.svg(canvas))


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
    look = look | {"markevery": max(1, len(rounds) // drawing.MARKERS_A_LINE)}
    places: list[float] = list(map(float, rounds))
    if by_traffic:
        traffic = [run.traffic() for run in runs]
        places = [float(np.mean([sums[round] for sums in traffic if round in sums])) / MB for round in rounds]
    axes.plot(places, [seeds.mean() for seeds in values], label=label, **look)
    if len(runs) > 1 and not by_traffic:
        low, high = [seeds.min() for seeds in values], [seeds.max() for seeds in values]
        axes.fill_between(rounds, low, high, color=look["color"], alpha=0.15, lw=0)
