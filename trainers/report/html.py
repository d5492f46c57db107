"""The pieces a page is made of. Everything that goes into one is escaped here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from .drawing import Drawing, Key
from .style import STYLE

__all__ = ["Card", "cards", "details", "figures", "notice", "page", "section", "table"]


@dataclass(frozen=True)
class Card:
    """One key figure.

    Attributes:
        name: What it is.
        value: The figure, as written.
        note: What to hold it against, "" for nothing.
        unit: Written small behind the value.
        share: A share in [0, 1] to draw as a bar, None for no bar.
        mood: "good" or "bad" colours the note.
    """

    name: str
    value: str
    note: str = ""
    unit: str = ""
    share: float | None = None
    mood: str = ""


def page(title: str, body: Iterable[str]) -> str:
    """Puts a whole page together.

    Args:
        title: Plain text.
        body: HTML pieces.
    """
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        # Nothing is to be fetched, so nothing is allowed to be.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">\n"
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{chr(10).join(piece for piece in body if piece)}\n</main>\n</body>\n"
        "</html>\n"
    )


def section(title: str, *pieces: str) -> str:
    """A headed section, "" where there is nothing in it."""
    content = "\n".join(piece for piece in pieces if piece)
    return f"<section>\n<h2>{escape(title)}</h2>\n{content}\n</section>" if content else ""


def notice(text: str) -> str:
    """A sentence that a reader must not miss."""
    return f'<p class="notice">{escape(text)}</p>'


def cards(entries: Iterable[Card]) -> str:
    """The grid of key figures."""
    return f'<dl class="cards">{"".join(map(_card, entries))}</dl>'


def _card(card: Card) -> str:
    unit = f" <small>{escape(card.unit)}</small>" if card.unit else ""
    bar = ""
    if card.share is not None:
        percent = 100 * min(max(card.share, 0.0), 1.0)
        bar = f'<div class="share"><i style="width:{percent:.1f}%"></i></div>'
    note = f'<div class="note {card.mood}">{escape(card.note)}</div>' if card.note else ""
    return (
        f'<div class="card"><dt>{escape(card.name)}</dt>'
        f'<dd><div class="value">{escape(card.value)}{unit}</div>{bar}{note}</dd></div>'
    )


def figures(drawings: Iterable[Drawing | None]) -> str:
    """The grid of figures, "" where all are None."""
    shown = [drawing for drawing in drawings if drawing is not None]
    if not shown:
        return ""
    # Rows of three where rows of two would leave a hole.
    three = " three" if sum(not drawing.narrow_svg for drawing in shown) % 3 == 0 else ""
    return f'<div class="figures{three}">\n{chr(10).join(map(_figure, shown))}\n</div>'


def _figure(drawing: Drawing) -> str:
    keys = "".join(_key(key) for key in drawing.keys)
    wide = ' class="wide"' if drawing.narrow_svg else ""
    narrow = drawing.narrow_svg.replace("<svg ", '<svg class="narrow" ', 1)
    return (
        f"<figure{wide}><h3>{escape(drawing.title)}</h3>"
        + (f'<ul class="keys">{keys}</ul>' if keys else "")
        + f"{narrow}{drawing.svg}<figcaption>{escape(drawing.caption)}</figcaption></figure>"
    )


def _key(key: Key) -> str:
    swatch = "" if key.swatch == "line" else f' class="{key.swatch}"'
    # The swatch takes its colour as text colour, so that its border and its fill agree.
    return f'<li><i{swatch} style="color:var(--{key.colour})"></i>{escape(key.label)}</li>'


def table(
    rows: Iterable[Sequence[str]],
    *,
    head: Sequence[str] = (),
    numeric: bool = False,
    best: Sequence[Sequence[bool]] = (),
) -> str:
    """A table whose first column names the rows.

    Args:
        rows: Plain text.
        head: Names of the columns, none for a table without a head.
        numeric: Whether all but the first column hold figures, to be set flush right.
        best: By row, which cells after the first to set in bold.
    """
    kind = ' class="figure"' if numeric else ""
    lines = []
    for number, row in enumerate(rows):
        cells = [f'<th scope="row">{escape(row[0])}</th>']
        for column, cell in enumerate(row[1:]):
            strong = number < len(best) and best[number][column]
            names = " ".join(name for name in ("figure" * numeric, "best" * strong) if name)
            cells.append(
                f"<td{f' class={chr(34)}{names}{chr(34)}' * bool(names)}>{escape(cell)}</td>"
            )
        lines.append(f"<tr>{''.join(cells)}</tr>")
    top = ""
    if head:
        names = "".join(f'<th scope="col"{kind}>{escape(name)}</th>' for name in head[1:])
        top = f'<thead><tr><th scope="col">{escape(head[0])}</th>{names}</tr></thead>'
    return f'<div class="sheet"><table>{top}<tbody>{"".join(lines)}</tbody></table></div>'


def details(title: str, content: str) -> str:
    """A piece that opens when asked."""
    return f"<details><summary>{escape(title)}</summary>{content}</details>"
