"""The documents, and what is in them: fenced blocks, and commands in blocks and sentences."""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
OUTSIDE = ("README.md", "CONTRIBUTING.md", "RELEASING.md", "SECURITY.md")
PAGES = [*(ROOT / name for name in OUTSIDE), *sorted((ROOT / "docs").rglob("*.md"))]

FENCED = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
SHELL = ("sh", "bash", "console")


def fenced_in(text: str) -> list[tuple[str, str]]:
    """The fenced blocks of a text: the language, which may be empty, and the content."""
    return [(language, content) for language, content in FENCED.findall(text)]


def fenced(page: Path) -> list[tuple[str, str]]:
    """A page's fenced blocks."""
    return fenced_in(page.read_text(encoding="utf-8"))


def blocks(page: Path, *languages: str) -> list[str]:
    """The contents of a page's fenced blocks of these languages."""
    return [content for language, content in fenced(page) if language in languages]


def section(page: Path, title: str) -> str:
    """The text below a page's heading of the second level, up to the next one."""
    _, heading, rest = page.read_text(encoding="utf-8").partition(f"\n## {title}\n")
    assert heading, f"{page.name} has no section {title!r}"
    return rest.partition("\n## ")[0]


def summary_of(run: Path) -> dict[str, Any]:
    """The summary of a run that an example made, as its readers find it."""
    return dict(json.loads((run / "summary.json").read_text(encoding="utf-8")))
