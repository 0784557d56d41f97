"""Draw README's picture, docs/images/demo.svg, from the demo's record: accuracy by round, and the bytes sent up.

python benchmarks/picture.py        at once
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "benchmarks" / "results" / "demo"
PICTURE = ROOT / "docs" / "images" / "demo.svg"

RUNS = {"vanilla-swat": ("vanilla SWAT", "#b45309"), "zerofl": ("ZeroFL", "#0f766e")}
"""The runs of the record: their names in the picture, and their colours."""
WIDTH, HEIGHT = 860, 300
LEFT, TOP, RIGHT, BOTTOM = 60, 56, 380, 250  # of the curves
BARS_LEFT, BARS_RIGHT, BAR = 590, 840, 44
STYLE = (
    "text{font-family:system-ui,sans-serif;font-size:13px;fill:#334155}.title{font-size:15px;font-weight:600;"
    "fill:#0f172a}.of-run{font-weight:600}.large{font-size:17px;font-weight:600}"
)


def read_rounds(run: str) -> list[dict[str, Any]]:
    """The lines of a recorded run."""
    lines = (RECORDS / run / "rounds.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def draw(rounds_of: dict[str, list[dict[str, Any]]]) -> str:
    """The picture as SVG, of each run's rounds."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="The demo: test '
        'accuracy by round, and megabytes sent up, of vanilla SWAT and of ZeroFL">',
        f"<style>{STYLE}</style>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#ffffff"/>',
        *_curves(rounds_of),
        *_bars({run: sum(r["uplink_bytes"] for r in rounds) / 1e6 for run, rounds in rounds_of.items()}),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _curves(rounds_of: dict[str, list[dict[str, Any]]]) -> list[str]:
    last = int(max(rounds[-1]["round"] for rounds in rounds_of.values()))

    def x(round: float) -> float:
        return LEFT + (RIGHT - LEFT) * round / last

    def y(accuracy: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * accuracy

    parts = [_text(LEFT, 28, "Test accuracy", "title")]
    for percent in (0, 25, 50, 75, 100):
        height = y(percent / 100)
        parts.append(f'<line x1="{LEFT}" x2="{RIGHT}" y1="{height:.1f}" y2="{height:.1f}" stroke="#e2e8f0"/>')
        parts.append(_text(LEFT - 8, height + 4, f"{percent} %", anchor="end"))
    parts += [_text(x(round), BOTTOM + 20, str(round), anchor="middle") for round in range(5, last + 1, 5)]
    parts.append(_text((LEFT + RIGHT) / 2, BOTTOM + 38, "round", anchor="middle"))
    ends = {run: rounds[-1]["test_accuracy"] for run, rounds in rounds_of.items()}
    for place, run in enumerate(sorted(ends, key=lambda run: -ends[run])):
        name, colour = RUNS[run]
        points = [(x(r["round"]), y(r["test_accuracy"])) for r in rounds_of[run] if "test_accuracy" in r]
        parts.append(_line(points, colour))
        label = f"{name} {ends[run]:.1%}".replace("%", " %")
        parts.append(_text(RIGHT + 8, y(ends[run]) - 6 + 18 * place, label, "of-run", colour))
    return parts


def _bars(megabytes: dict[str, float]) -> list[str]:
    most = max(megabytes.values())
    parts = [_text(BARS_LEFT, 28, "Sent up by all clients", "title")]
    for place, (run, mb) in enumerate(megabytes.items()):
        name, colour = RUNS[run]
        top, width = TOP + 36 + place * 90, (BARS_RIGHT - BARS_LEFT) * mb / most
        parts.append(_text(BARS_LEFT, top - 8, f"{name}: {mb:,.1f} MB", "of-run", colour))
        parts.append(f'<rect x="{BARS_LEFT}" y="{top}" width="{width:.1f}" height="{BAR}" rx="3" fill="{colour}"/>')
        if mb < most:
            parts.append(_text(BARS_LEFT + width + 12, top + 28, f"{most / mb:.0f} times less", "large", colour))
    return parts


def _line(points: Sequence[tuple[float, float]], colour: str) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2.5" stroke-linejoin="round"/>'


def _text(x: float, y: float, text: str, kind: str = "", colour: str = "", anchor: str = "start") -> str:
    kind = f' class="{kind}"' if kind else ""
    colour = f' style="fill:{colour}"' if colour else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{kind}{colour}>{text}</text>'


if __name__ == "__main__":
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(draw({run: read_rounds(run) for run in RUNS}), encoding="utf-8")
