"""The report as files: one self-contained page, and its tables as Markdown and CSV."""

import base64
import re
from html import escape
from pathlib import Path

from zerofl.report.cells import Beside, Cell, Table, as_csv, escaped, lines_of, markdown
from zerofl.report.collect import Collection
from zerofl.report.drawing import Figure
from zerofl.report.figures import figures
from zerofl.report.tables import tables
from zerofl.run.files import ResultsError, write_atomically

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 78rem; padding: 1rem; color: #111; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.3rem; margin-top: 2.5rem; border-bottom: 2px solid #111; }
h1, h2, h3 { overflow-wrap: anywhere; } h3 { font-size: 1.05rem; margin-top: 2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: separate; border-spacing: 0; font-size: 0.75rem; line-height: 1.35; }
th, td { border-bottom: 1px solid #ccc; padding: 0.25rem 0.35rem; text-align: right; white-space: nowrap; }
th { vertical-align: bottom; white-space: normal; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
td.long { white-space: normal; min-width: 12rem; text-align: left; overflow-wrap: anywhere; }
.paper, .note, figcaption { color: #444; } .note, figcaption { font-size: 0.85rem; overflow-wrap: anywhere; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; } img.wide { min-width: 44rem; }
@media (max-width: 40rem) { td:first-child { white-space: normal; min-width: 5.5rem; overflow-wrap: anywhere; } }
"""
LONG = 40  # characters from which a cell is broken into lines
WIDE_POINTS = 420  # from which a figure is not made smaller than its letters allow: a narrow screen scrolls it

MARKS = {
    ".html": "<!doctype html>\n<!-- made by zerofl report -->\n",
    ".md": "<!-- made by zerofl report -->\n",
    ".csv": "folder,table,",
}
"""How each of a report's files begins, by its suffix: another file is never written over."""


def write_report(collections: list[Collection], out: Path) -> list[Path]:
    """Write the page `out`, and beside it the tables with the suffixes .md and .csv; returns what was written.

    Raises:
        ResultsError: as `check_out`.
        OSError: a file cannot be written.
    """
    check_out(out)
    made = [(c, tables(c), figures(c)) for c in collections]
    named = [(c.name, table) for c, found, _ in made for table in found]
    sections = [_markdown_section(c, found) for c, found, _ in made]
    contents = {
        out: MARKS[".html"] + _page(made),
        out.with_suffix(".md"): MARKS[".md"] + "# ZeroFL report\n\n" + "\n".join(sections),
        out.with_suffix(".csv"): as_csv(named),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    for path, text in contents.items():
        write_atomically(path, text.encode())
    return list(contents)


def check_out(out: Path) -> None:
    """Raise unless a report can be written to `out`, before anything is made.

    Raises:
        ResultsError: its name does not end in .html, or one of the three files is there and is not of a report.
    """
    if out.suffix != ".html":
        raise ResultsError(
            f"--out {out}: expected a name ending in .html; the tables are put beside it as .md and .csv, "
            f"for example --out {out.with_suffix('.html') if out.name else 'report.html'}"
        )
    for suffix, mark in MARKS.items():
        path = out.with_suffix(suffix)
        if path.exists() and not path.read_bytes().startswith(mark.encode()):
            raise ResultsError(
                f"{path} is there and was not made by zerofl report: move it away, or write elsewhere with --out"
            )


def _page(made: list[tuple[Collection, list[Table], list[Figure]]]) -> str:
    body = "".join(_section(*parts) for parts in made)
    return (
        '<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>ZeroFL report</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>ZeroFL report</h1>\n{body}"
        "</body>\n</html>\n"
    )


def _section(collection: Collection, found: list[Table], pictures: list[Figure]) -> str:
    first, *rest = (_table(table) for table in found)
    parts = [f"<h2>{escape(collection.name)}</h2>\n<p>{escape(collection.about)}</p>\n", first]
    return "".join([*parts, *map(_figure, pictures), *rest])


def _markdown_section(collection: Collection, found: list[Table]) -> str:
    opening = f"## {escaped(collection.name)}\n\n{escaped(collection.about)}\n\n"
    return opening + "\n".join(markdown(table) for table in found)


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in table.columns)
    body = "".join("<tr>" + "".join(_cell(cell) for cell in row) + "</tr>\n" for row in table.rows)
    return (
        f'<h3>{escape(table.heading)}</h3>\n<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n'
        f'<tbody>\n{body}</tbody></table></div>\n<p class="note">{escape(table.note)}</p>\n'
    )


def _cell(cell: Cell) -> str:
    lines = [escape(line) for line in lines_of(cell)]
    kind = ' class="long"' if max(map(len, lines), default=0) > LONG else ""
    if isinstance(cell, Beside) and cell.paper:
        lines[-1] = f'<span class="paper">{lines[-1]}</span>'
    return f"<td{kind}>{'<br>'.join(lines)}</td>"


def _figure(figure: Figure) -> str:
    data = base64.b64encode(figure.svg).decode()
    width = re.search(rb'<svg[^>]* width="([\d.]+)pt"', figure.svg)
    kind = ' class="wide"' if width and float(width[1]) > WIDE_POINTS else ""
    return (
        f'<figure><h3>{escape(figure.heading)}</h3>\n<div class="scroll"><img{kind} '
        f'src="data:image/svg+xml;base64,{data}" alt="{escape(figure.heading)}"></div>\n'
        f"<figcaption>{escape(figure.caption)}</figcaption></figure>\n"
    )
