"""A hook of MkDocs: the site has what the documents link to in the repository, and links that work in both.

README.md is the site's first page. A document's links are relative to where it is in the repository; here those to
other documents become links between pages, and what else they name, records and sources, is copied into the site.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md",
         "RELEASING.md": "releasing.md", "SECURITY.md": "security.md",
         "results/README.md": "results.md", "results/report.md": "results-report.md"}  # fmt: skip
"""Documents outside docs/, and their pages."""
COPIES = "repository"
"""The folder of the site for what is no page."""

_FENCED = re.compile(r"(^ *```.*?^ *```$)", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(\[[^\]]*\])\(([^)\s#:]+)(#[^)\s]*)?\)")
_LOADED = re.compile(r"<(?:script|img|link|iframe|source)\b[^>]*\b(?:src|href)=\"?(?:https?:)?//[^>]*>")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from outside docs/, and copies of what the documents link to."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    copied = {linked for file in files.documentation_pages() for linked in _linked(file) if _page_of(linked) is None}
    for linked in sorted(copied):
        path = ROOT / linked
        for file in _files(path):
            copy = f"{COPIES}/{file.relative_to(ROOT).as_posix()}"
            if files.get_file_from_path(copy) is None:
                files.append(File.generated(config, copy, abs_src_path=str(file)))
        if path.is_dir():
            names = [file.relative_to(path).as_posix() for file in _files(path)]
            listing = "".join(f"<li><a href='{name}'>{name}</a></li>\n" for name in names)
            content = f"<!doctype html><meta charset='utf-8'><title>{linked}</title><h1>{linked}</h1><ul>{listing}</ul>"
            files.append(File.generated(config, f"{COPIES}/{linked}/index.html", content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn the links of a document in the repository into those of its page."""
    here = posixpath.dirname(page.file.src_uri)

    def link(match: re.Match[str]) -> str:
        text, target, anchor = match[1], _resolved(page.file, match[2]), match[3] or ""
        to = _page_of(target)
        if to is None:
            to = f"{COPIES}/{target}" + ("/index.html" if (ROOT / target).is_dir() else "")
        return f"{text}({posixpath.relpath(to, here or '.')}{anchor})"

    parts = _FENCED.split(markdown)
    return "".join(part if part.lstrip().startswith("```") else _LINK.sub(link, part) for part in parts)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Raise if the page would load anything from the network."""
    if found := _LOADED.search(output):
        raise PluginError(f"{page.file.src_uri} would load {found[0]} when it is read")
    return output


def _linked(file: File) -> set[str]:
    """What a document links to: paths in the repository."""
    return {_resolved(file, match[2]) for match in _LINK.finditer(_FENCED.sub("", file.content_string))}


def _resolved(file: File, target: str) -> str:
    """A document's relative link as a path in the repository, which must be there."""
    source = next((path for path, page in PAGES.items() if page == file.src_uri), f"docs/{file.src_uri}")
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    if path.startswith("..") or not (ROOT / path).exists():
        raise PluginError(f"{source} links to {target}, which is not there")
    return path


def _page_of(path: str) -> str | None:
    """The page that a document or a folder with a README is; None for any other file."""
    for name in (path, f"{path}/README.md"):
        if name in PAGES:
            return PAGES[name]
    inside = path.removeprefix("docs/")
    return inside if inside != path and not inside.endswith(".py") else None


def _files(path: Path) -> list[Path]:
    """The file itself, or those of a folder, without what Python leaves there."""
    inside = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [file for file in inside if file.is_file() and "__pycache__" not in file.parts]
