"""Pages that are made from the code: a method's from its docstrings, examples from their files.

Everything here is a function of text, without mkdocs.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from lowrank.optimizers.engine.method import TABLE, Method

#: A line of a page that stands for the source of an example.
EXAMPLE = re.compile(r"^<!-- example: (\S+\.py) -->$", re.MULTILINE)
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!https?:|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)")
_FENCED = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
_ENTRY = re.compile(r"^    (\S[^:]*): (.*)$")


def method_modules() -> dict[str, list[Method]]:
    """The pages in `optimizers/methods`, by the last part of their names, with their methods."""
    found: dict[str, list[Method]] = {}
    for name in sorted(TABLE):
        row = TABLE[name]
        found.setdefault(row.optimizer.__module__.rpartition(".")[2], []).append(row)
    return found


def title(module: str) -> str:
    """A method's name as its page's docstring has it: what comes before the first colon."""
    line = _docstring(module).splitlines()[0]
    name, colon, _ = line.partition(":")
    return name if colon and len(name) < 30 else module.replace("_", " ").capitalize()


def _docstring(module: str) -> str:
    row = method_modules()[module][0]
    return inspect.cleandoc(sys.modules[row.optimizer.__module__].__doc__ or "")


def method_page(module: str, notes: str) -> str:
    """The page of a method: its rule, its classes with their options, and notes on its use.

    Args:
        module: one of `method_modules()`.
        notes: sections "When to use it" and "Traps"; may be empty.
    """
    rows = method_modules()[module]
    parts = [f"# {title(module)}", _table(rows)]
    if notes.strip():
        parts.append(notes.strip())
    parts += ["## Rule", prose(_docstring(module))]
    for row in rows:
        parts += [f"## `{row.optimizer.__name__}`", _class_section(row)]
    return "\n\n".join(parts) + "\n"


def _table(rows: list[Method]) -> str:
    lines = ["| `build` | class | state of m x n, m <= n | weights |", "|---|---|---|---|"]
    for row in rows:
        cells = (f"`{row.name}`", f"`{row.optimizer.__name__}`", row.state, row.weights or "m n")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _class_section(row: Method) -> str:
    text = inspect.cleandoc(row.optimizer.__doc__ or "")
    body, _, rest = text.partition("\nArgs:\n")
    entries = arguments(rest.partition("\nRaises:")[0])
    lines = ["| argument | meaning |", "|---|---|"]
    for name, meaning in entries.items():
        lines.append(f"| `{name}` | {_cell(meaning)} |")
    spelled = (
        f"\n\nAlso: {', '.join(f'`{name}`' for name in row.spellings)}." if row.spellings else ""
    )
    table = "\n".join(lines)
    details = f'<details markdown="1">\n<summary>Arguments</summary>\n\n{table}\n\n</details>'
    return f"{prose(body)}{spelled}\n\n{details}"


def arguments(section: str) -> dict[str, str]:
    """The entries of a docstring's `Args:` section, each on one line."""
    found: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        entry = _ENTRY.match(line)
        if entry:
            name = entry[1]
            found[name] = entry[2]
        elif line.strip() and name:
            found[name] += " " + line.strip()
    return found


def _cell(text: str) -> str:
    return escaped(text).replace("|", "\\|")


def prose(text: str) -> str:
    """A docstring as markdown: signs that markdown reads are escaped outside of code."""
    made = []
    for line in text.splitlines():
        made.append(line if line.startswith("    ") else escaped(line))
    return "\n".join(made)


def escaped(line: str) -> str:
    """A line of plain text, with `code` as it is."""
    parts = re.split(r"(`[^`]*`)", line)
    for index in range(0, len(parts), 2):
        parts[index] = re.sub(r"([*_<>\[\]])", r"\\\1", parts[index])
    linked = "".join(parts)
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"arXiv [\1](https://arxiv.org/abs/\1)", linked)


def with_examples(text: str, folder: Path) -> str:
    """A page in which the lines `EXAMPLE` are replaced by the files' text."""

    def source(found: re.Match[str]) -> str:
        return f"```python\n{(folder / found[1]).read_text('utf-8').strip()}\n```"

    return EXAMPLE.sub(source, text)


def relinked(text: str, target: Callable[[str], str | None]) -> str:
    """A page with its links changed.

    Args:
        text: markdown.
        target: by a link's path, the new one; None where there is no such page, so that the
            link's text is left, with the path beside it.
    """

    def one(found: re.Match[str]) -> str:
        path = target(found[2])
        if path is None:
            return found[1] if found[1].strip("`") == found[2] else f"{found[1]} (`{found[2]}`)"
        return f"[{found[1]}]({path}{found[3] or ''})"

    parts = _FENCED.split(text)
    return "".join(part if i % 2 else _LINK.sub(one, part) for i, part in enumerate(parts))


def front_page(readme: str, pages: Mapping[str, str]) -> str:
    """The README as the site's first page.

    Args:
        readme: its text.
        pages: paths of the site's pages, by their paths in the repository.
    """
    return relinked(readme, pages.get)
