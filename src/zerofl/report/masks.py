"""Figures of where the active weights are: the paper's Figures 2, 3, 5 and 6, and how far clients' masks overlap."""

from typing import Any

import numpy as np
import torch
from matplotlib import colormaps, rc_context
from matplotlib.figure import Figure as Canvas

from zerofl.report import drawing
from zerofl.report.collect import Collection, ReportRow
from zerofl.report.drawing import Figure
from zerofl.report.tables import strategy

HEAT_MAP_WEIGHTS = 400  # rows of a heat map: so many weights of a layer, at even steps
HEAT_MAP_LAYERS = slice(4, 10)  # Figure 3 shows layers 4 to 9


def nonzero_ratios(collection: Collection) -> Figure | None:
    """Figure 2: the non-zero ratio of each sparse layer after the aggregation, where only top-K weights are sent."""
    rows = [row for row in collection.started if strategy(row.experiment) == "top_k_weights"]
    if not rows:
        return None
    with rc_context(drawing.STYLE):
        canvas, panels = drawing.panels(len(rows))
        for axes, row in zip(panels, rows, strict=True):
            records = row.runs[0].rounds
            layers = list(records[0].nonzero_ratio)
            e = row.experiment
            for number, layer in enumerate(layers):
                shade = 0.85 * number / max(1, len(layers) - 1)
                values = [record.nonzero_ratio[layer] for record in records]
                rounds = [record.round for record in records]
                look: dict[str, Any] = {"color": colormaps["viridis"](shade), "ls": drawing.DASHES[number % 4], "lw": 1}
                axes.plot(rounds, values, label=layer, **look)
            sent = min(1.0, 1 - e.sparsity + e.mask_ratio)
            axes.axhline(sent, color="black", lw=0.8)
            axes.set(title=f"{row.name}: clients send {sent:.0%}")
            drawing.round_axis(axes)
        panels[0].set_ylabel("Non-zero ratio")
        canvas.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7)
        caption = (
            "The fraction of a layer that is not zero in the aggregated model. The black line is what one client "
            "sends, which it would be if all clients sent the same positions."
        )
        return Figure("Figure 2: non-zero ratio after the aggregation", caption, drawing.svg(canvas))


def overlaps(collection: Collection) -> Figure | None:
    """How far the positions that two clients send are the same, the mean over the layers."""
    rows = [row for row in collection.started if any(record.mask_overlap for record in row.runs[0].rounds)]
    if not rows:
        return None
    with rc_context(drawing.STYLE):
        canvas = Canvas(figsize=(6.4, 3.6), layout="constrained")
        axes = canvas.subplots()
        # A row without masks keeps its place, so that the others look here as in the curves of accuracy.
        looks = drawing.looks(len(rows[0].runs[0].rounds), len(collection.started))
        for row, look in zip(collection.started, looks, strict=True):
            found = [(record.round, record.mask_overlap) for record in row.runs[0].rounds if record.mask_overlap]
            if not found:
                continue
            values = [float(np.mean(list(overlap.values()))) for _, overlap in found]
            axes.plot([round for round, _ in found], values, label=row.name, **look)
        axes.set(ylabel="Shared by two clients", ylim=(0, 1.05))  # a line at 1 is seen whole
        drawing.round_axis(axes)
        canvas.legend(loc="outside right upper", fontsize=7)
        caption = "Of the positions that one client sends, the part that another sends too; the mean over the layers."
        return Figure("Overlap of the clients' masks", caption, drawing.svg(canvas))


def overlaps_by_layer(collection: Collection) -> Figure | None:
    """The overlap of each sparse layer by its depth, the mean over the second half of the rounds (contribution 2)."""
    with rc_context(drawing.STYLE):
        canvas = Canvas(figsize=(6.4, 3.8), layout="constrained")
        axes = canvas.subplots()
        layers: list[str] = []
        looks = drawing.looks(drawing.MARKERS_A_LINE, len(collection.started))
        for row, look in zip(collection.started, looks, strict=True):
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
        return Figure("Overlap of the clients' masks by layer", caption, drawing.svg(canvas))


def heat_maps(row: ReportRow) -> Figure | None:
    """Figures 3, 5 and 6: a layer's aggregated weights, flattened, at the rounds that were kept."""
    snapshots = row.runs[0].snapshots()
    if len(snapshots) < 2:
        return None
    rounds = list(snapshots)
    layers = list(snapshots[rounds[0]])
    chosen = layers[HEAT_MAP_LAYERS] if len(layers) >= HEAT_MAP_LAYERS.stop else layers
    with rc_context(drawing.STYLE | {"axes.grid": False}):
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
        return Figure(f"Figures 3, 5 and 6: where the weights are, {row.name}", caption, drawing.svg(canvas))
