from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowrank.trainers.data.errors import BadDocumentError
from lowrank.trainers.data.passages import passages
from lowrank.trainers.data.records import parse_json, parse_text


def as_read(line: bytes) -> str:
    """How the reader hands over a line."""
    return line.decode("latin-1")


def test_json_line_gives_its_text() -> None:
    line = '{"text": "gr\u00fc\u00df dich \u2603", "url": "x"}'
    assert parse_json(as_read(line.encode()), first=False) == "gr\u00fc\u00df dich \u2603"


def test_byte_order_mark_opens_a_file_only() -> None:
    line = as_read(b'\xef\xbb\xbf{"text": "a"}')
    assert parse_json(line, first=True) == "a"
    with pytest.raises(BadDocumentError, match="broken JSON"):
        parse_json(line, first=False)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', "broken JSON .* column 13"),
        (b"[" * 100_000, "broken JSON"),
        (b'{"body": "a"}', "no field 'text'"),
        (b'{"text": null}', "'text' is null, not a string"),
        (b'{"text": 3}', "'text' is int, not a string"),
        (b'["text"]', "the JSON value is list, not an object"),
        (b'{"text": "  \\n"}', "'text' is empty"),
        (b'{"text": "\xff"}', "not UTF-8 .byte 0xff"),
        (b'{"text": "\\ud800"}', "lone surrogate"),
    ],
)
def test_unusable_json_lines_say_why(line: bytes, message: str) -> None:
    with pytest.raises(BadDocumentError, match=message):
        parse_json(as_read(line), first=False)


def test_text_that_is_no_utf8_says_so() -> None:
    assert parse_text(as_read("\u00e9t\u00e9".encode()), first=False) == "\u00e9t\u00e9"
    with pytest.raises(BadDocumentError, match="not UTF-8"):
        parse_text(as_read(b"caf\xe9"), first=False)


@given(
    st.lists(st.text(alphabet="ab \t\u00a0\u0085", max_size=12), max_size=40),
    st.integers(1, 30),
    st.integers(30, 60),
)
def test_passages_lose_nothing_but_blank_lines(
    lines: list[str], shortest: int, longest: int
) -> None:
    cut = list(passages(lines, shortest, longest))
    kept = [line for line in lines if line.strip(" \t")]
    assert [line for _, text in cut for line in text.split("\n") if line.strip(" \t")] == kept
    for number, text in cut:
        opening, closing = text.split("\n")[0], text.split("\n")[-1]
        assert opening.strip(" \t")
        assert closing.strip(" \t")
        assert lines[number - 1] == opening


def test_passages_end_at_a_blank_line_once_long_enough() -> None:
    lines = ["aaaa", "", "bbbb", "", "cc", "dd"]
    assert list(passages(lines, shortest=8, longest=100)) == [(1, "aaaa\n\nbbbb"), (5, "cc\ndd")]


def test_passages_end_at_any_line_once_too_long() -> None:
    assert list(passages(["aaaa", "bbbb", "cc"], shortest=8, longest=9)) == [
        (1, "aaaa\nbbbb"),
        (3, "cc"),
    ]
