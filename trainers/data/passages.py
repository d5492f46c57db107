"""Plain text has no documents of its own: it is cut at blank lines into passages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

SHORTEST = 2_000
LONGEST = 16_000

# Lines may be bytes read as Latin-1, in which str.isspace would call a part of a UTF-8 character
# a space.
_BLANKS = " \t\r\n\f\v"


def passages(
    lines: Iterable[str], shortest: int = SHORTEST, longest: int = LONGEST
) -> Iterator[tuple[int, str]]:
    """Cut lines into passages and lose nothing but the blank lines around them.

    A passage ends at the first blank line once it has ``shortest`` characters, and at any line's
    end once it has ``longest``. It keeps its inner line breaks.

    Args:
        lines: The text's lines without their line ends.
        shortest: Characters before a blank line ends a passage.
        longest: Characters before any line's end ends one.

    Yields:
        The number of the passage's first line, from 1, and its text.
    """
    kept: list[str] = []
    size = 0
    start = 1
    for number, line in enumerate(lines, start=1):
        blank = not line.strip(_BLANKS)
        if blank and (not kept or size >= shortest):
            if kept:
                yield start, _joined(kept)
                kept, size = [], 0
            continue
        if not kept:
            start = number
        kept.append(line)
        size += len(line) + 1
        if size >= longest:
            yield start, _joined(kept)
            kept, size = [], 0
    if kept:
        yield start, _joined(kept)


def _joined(lines: list[str]) -> str:
    end = len(lines)
    while end > 1 and not lines[end - 1].strip(_BLANKS):
        end -= 1
    return "\n".join(lines[:end])
