"""How a report's figures look: lines that can be told apart by colour, dashes and marker, in grey too; and SVG."""

import io
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

# Of Okabe and Ito, told apart by all eyes; more lines than these take theirs from a colour map.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9", "#7F7F7F")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (8, 3)))
MARKERS = ("o", "s", "^", "v", "D", "x", "+", "*")
MARKERS_A_LINE = 8
STYLE: Any = {
    "svg.hashsalt": "zerofl", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "savefig.bbox": "tight",
    "text.parse_math": False,  # a name may have a $ in it
}  # fmt: skip


class Figure(NamedTuple):
    """A heading, what is to be seen, and the picture as SVG."""

    heading: str
    caption: str
    svg: bytes


def legend_below(axes: Axes) -> None:
    """The legend under the panel, where it hides no curve."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, fontsize=7, frameon=False)


def plain_numbers(axes: Axes) -> None:
    """A logarithmic axis with numbers as people write them."""
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def round_axis(axes: Axes) -> None:
    """Rounds along the axis, in whole numbers."""
    axes.set_xlabel("Round")
    axes.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10], integer=True))


def looks(points: int, lines: int) -> list[dict[str, Any]]:
    """Colour, dashes and marker of each line; no two have the same colour."""
    every = max(1, points // MARKERS_A_LINE)
    colours = COLOURS if lines <= len(COLOURS) else [colormaps["turbo"](place) for place in np.linspace(0, 0.95, lines)]
    return [
        {"color": colours[i], "ls": DASHES[i % 7], "marker": MARKERS[i % 8], "ms": 4, "lw": 1.2, "markevery": every}
        for i in range(lines)
    ]


def panels(count: int) -> tuple[Canvas, list[Axes]]:
    """A canvas with so many panels, three in a line."""
    columns = min(count, 3)
    lines = -(-count // columns)
    canvas = Canvas(figsize=(max(5.5, 4 * columns), 3.6 * lines), layout="constrained")
    grid = canvas.subplots(lines, columns, squeeze=False).flatten()
    for unused in grid[count:]:
        unused.set_axis_off()
    return canvas, list(grid[:count])


def svg(canvas: Canvas) -> bytes:
    """The picture, the same bytes for the same picture."""
    file = io.BytesIO()
    canvas.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()
