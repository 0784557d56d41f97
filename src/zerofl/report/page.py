"""The report as files: one self-contained page, and its tables as Markdown and CSV."""

import base64
from html import escape
from pathlib import Path

from zerofl.report.collect import Collection
from zerofl.report.figures import Figure, figures, persistence_table
from zerofl.report.tables import Table, as_csv, markdown, tables
from zerofl.results import write_atomically

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 75rem; padding: 1rem; color: #111; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.3rem; margin-top: 2.5rem; border-bottom: 2px solid #111; }
h3 { font-size: 1.05rem; margin-top: 2rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 0.85rem; }
th, td { border-bottom: 1px solid #ccc; padding: 0.25rem 0.6rem; text-align: right; white-space: nowrap; }
th { vertical-align: bottom; white-space: normal; } th:first-child, td:first-child { text-align: left; }
td.long { white-space: normal; min-width: 12rem; text-align: left; overflow-wrap: anywhere; }
.note, figcaption { color: #444; font-size: 0.85rem; overflow-wrap: anywhere; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; }
"""
LONG = 40  # characters from which a cell is broken into lines


def write_report(collections: list[Collection], out: Path) -> list[Path]:
    """Write the page `out`, and beside it the tables with the suffixes .md and .csv; returns what was written.

    Raises:
        OSError: a file cannot be written.
    """
    made = [(c, _all_tables(c), figures(c)) for c in collections]
    named = [(c.name, table) for c, found, _ in made for table in found]
    sections = [f"## {c.name}\n\n{c.about}\n\n" + "\n".join(markdown(t) for t in found) for c, found, _ in made]
    contents = {
        out: _page(made),
        out.with_suffix(".md"): "# ZeroFL report\n\n" + "\n".join(sections),
        out.with_suffix(".csv"): as_csv(named),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    for path, text in contents.items():
        write_atomically(path, text.encode())
    return list(contents)


def _all_tables(collection: Collection) -> list[Table]:
    persistence = persistence_table(collection)
    return tables(collection) + ([persistence] if persistence else [])


def _page(made: list[tuple[Collection, list[Table], list[Figure]]]) -> str:
    body = "".join(_section(*parts) for parts in made)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>ZeroFL report</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>ZeroFL report</h1>\n{body}"
        "</body>\n</html>\n"
    )


def _section(collection: Collection, found: list[Table], pictures: list[Figure]) -> str:
    first, *rest = (_table(table) for table in found)
    parts = [f"<h2>{escape(collection.name)}</h2>\n<p>{escape(collection.about)}</p>\n", first]
    return "".join([*parts, *map(_figure, pictures), *rest])


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in table.columns)
    body = "".join("<tr>" + "".join(_cell(cell) for cell in row) + "</tr>\n" for row in table.rows)
    return (
        f'<h3>{escape(table.heading)}</h3>\n<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n'
        f'<tbody>\n{body}</tbody></table></div>\n<p class="note">{escape(table.note)}</p>\n'
    )


def _cell(text: str) -> str:
    kind = ' class="long"' if len(text) > LONG else ""
    return f"<td{kind}>{escape(text)}</td>"


def _figure(figure: Figure) -> str:
    data = base64.b64encode(figure.svg).decode()
    return (
        f'<figure><h3>{escape(figure.heading)}</h3>\n<img src="data:image/svg+xml;base64,{data}" '
        f'alt="{escape(figure.heading)}">\n<figcaption>{escape(figure.caption)}</figcaption></figure>\n'
    )
