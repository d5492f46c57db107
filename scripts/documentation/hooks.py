"""Hooks of mkdocs: pages from the code, the README as the first page, links to other files."""

from __future__ import annotations

import posixpath
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File
from pygments.formatters import HtmlFormatter

ROOT = Path(__file__).resolve().parent.parent.parent
DOCS = ROOT / "docs"
sys.path.insert(0, str(ROOT / "scripts"))

from documentation import pages  # noqa: E402

#: The entry of the navigation that the methods' pages stand under.
SECTION = "Methods"
#: Beside the colours of code: long lines of tables scroll within the page, on a phone too.
STYLE = """
.wy-nav-content {max-width: 60rem}
.wy-table-responsive table td, .wy-table-responsive table th {white-space: normal}
.rst-content table.docutils td, .rst-content table.docutils th {vertical-align: top}
.rst-content pre {overflow-x: auto; padding: 12px; line-height: 1.4; font-size: 13px}
.rst-content .codehilite, .rst-content .codehilite pre {background: #f8f8f8}
.rst-content div.codehilite {border: 1px solid #e1e4e5; margin: 1px 0 24px; padding: 0}
.rst-content div.codehilite pre {border: 0; margin: 0}
summary {cursor: pointer; margin-bottom: 12px}
"""


def on_config(config: Any) -> Any:
    """Puts a page for each method into the navigation, and pages that mkdocs.yml doesn't name."""
    text = (ROOT / "mkdocs.yml").read_text("utf-8")
    unnamed = [path.name for path in DOCS.glob("*.md") if f": {path.name}\n" not in text]
    if unnamed:
        config.nav.append({"More": sorted(unnamed)})
    for entry in config.nav:
        if SECTION in entry:
            listed = [{pages.title(name): _path(name)} for name in pages.method_modules()]
            entry[SECTION] += sorted(listed, key=lambda item: next(iter(item)).lower())
    return config


def on_files(files: Any, *, config: Any) -> Any:
    """Adds the first page, the style, and pages of methods that have no notes."""
    readme = (ROOT / "README.md").read_text("utf-8")
    inside = {f"docs/{file.src_uri}": file.src_uri for file in files}
    files.append(File.generated(config, "index.md", content=pages.front_page(readme, inside)))
    colours = HtmlFormatter(style="default").get_style_defs(".codehilite")
    files.append(File.generated(config, "assets/site.css", content=colours + STYLE))
    for name in pages.method_modules():
        if files.get_file_from_path(_path(name)) is None:
            files.append(File.generated(config, _path(name), content=""))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Fills in methods and examples; links that leave the site become names of files."""
    source = page.file.src_uri
    folder, _, name = source.removesuffix(".md").rpartition("/")
    if folder == "methods":
        known = pages.method_modules()
        if name not in known:
            raise ValueError(f"docs/{source} is the page of no method; accepted: {sorted(known)}")
        markdown = pages.method_page(name, markdown)
    markdown = pages.with_examples(markdown, DOCS / "examples")

    def target(path: str) -> str | None:
        whole = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        inside = files.get_file_from_path(whole) is not None
        if not inside and not (DOCS / whole).exists():
            return path  # mkdocs names it
        return path if inside else None

    return pages.relinked(markdown, target)


def _path(module: str) -> str:
    return f"methods/{module}.md"
