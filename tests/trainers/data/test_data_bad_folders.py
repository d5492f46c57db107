"""What a folder may hold that isn't plain UTF-8 text: decoded, or named and never trained on."""

from __future__ import annotations

import codecs
import gzip
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from lowrank.trainers.data import (
    DataConfig,
    DataError,
    TrainingStream,
    ValidationSet,
    data_fingerprint,
)
from lowrank.trainers.data.files import FileSource, folder_source
from lowrank.trainers.data.records import Split
from lowrank.trainers.data.tokenizer_bytes import ByteTokenizer

JsonLines = Callable[[Sequence[object]], bytes]
TEXT = "gr\u00fc\u00dfe \u2603\nsecond line"
#: Names of codecs, each with the mark that a writer puts before the text.
MARKED = {
    "utf-8": codecs.BOM_UTF8,
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-le": codecs.BOM_UTF32_LE,
    "utf-32-be": codecs.BOM_UTF32_BE,
}


def texts_of(source: FileSource, split: Split = "train") -> list[str]:
    return [
        source.text(shard, record)
        for shard in source.shards(split)
        for record in source.records(shard)
    ]


def stream_of(folder: Path, messages: list[str], **options: object) -> TrainingStream:
    config = replace(
        DataConfig(source=str(folder), tokenizer="bytes", sequence_length=8, shuffle_block=0),
        **options,  # type: ignore[arg-type]
    )
    return TrainingStream(config, ByteTokenizer(), batch_size=1, seed=0, on_warning=messages.append)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a validation file, so that all the rest is for training."""
    path = tmp_path / "data"
    path.mkdir()
    (path / "val.txt").write_text("held out")
    return path


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("name", MARKED)
def test_a_byte_order_mark_names_the_encoding(folder: Path, name: str, zipped: bool) -> None:
    content = MARKED[name] + TEXT.replace("\n", "\r\n").encode(name)
    lines = [json.dumps({"text": TEXT}, ensure_ascii=False), '{"text": "next"}', ""]
    marked = MARKED[name] + "\n".join(lines).encode(name)
    suffix = ".gz" if zipped else ""
    pack = gzip.compress if zipped else bytes
    (folder / f"a.jsonl{suffix}").write_bytes(pack(marked))
    expected = [TEXT, "next"]
    if not zipped:
        (folder / "b.txt").write_bytes(content)
        expected.append(TEXT)
    assert texts_of(folder_source(str(folder))) == expected


def test_utf16_is_never_trained_on_as_bytes(folder: Path) -> None:
    (folder / "a.txt").write_bytes(codecs.BOM_UTF16_LE + "plain words".encode("utf-16-le"))
    inputs = next(stream_of(folder, [])).inputs.flatten().tolist()
    assert bytes(inputs) == b"plain wo"


@pytest.mark.parametrize("name", ["utf-16-le", "utf-16-be", "utf-32-le"])
def test_nul_characters_without_a_mark_are_refused(folder: Path, name: str) -> None:
    (folder / "a.txt").write_bytes("words without a mark".encode(name))
    (folder / "b.jsonl").write_bytes('{"text": "the same"}'.encode(name))
    (folder / "c.jsonl").write_text('{"text": "a\\u0000b"}')
    (folder / "d.txt").write_text("good text in the last file")
    messages: list[str] = []
    stream = stream_of(folder, messages)
    assert bytes(next(stream).inputs.flatten().tolist()) == b"good tex"
    assert stream.skipped_documents == 3
    reasons = [message.split(": ", 1)[1] for message in messages]
    assert all(
        f"{what} holds NUL characters: binary data, or UTF-16 without a byte-order mark" in reason
        for what, reason in zip(("the passage", "the line", "'text'"), reasons, strict=True)
    )


def test_broken_utf16_is_one_problem(folder: Path) -> None:
    (folder / "a.txt").write_bytes(codecs.BOM_UTF16_LE + "words".encode("utf-16-le")[:-1])
    (folder / "b.txt").write_text("good text")
    messages: list[str] = []
    next(stream_of(folder, messages))
    (message,) = messages
    assert "a.txt: the file can't be read (UnicodeDecodeError: 'utf-16" in message


def test_decoding_another_way_makes_other_data(folder: Path) -> None:
    """So that neither a position nor a cached tokenizer of the former bytes is taken for it."""
    words = "words".encode("utf-16-le")
    prints = []
    for content in (codecs.BOM_UTF16_LE + words, b"ab" + words):
        (folder / "a.txt").write_bytes(content)
        prints.append(data_fingerprint(DataConfig(source=str(folder)))["sha256"])
    assert prints[0] != prints[1]


def test_what_is_not_read_is_counted_in_one_line(folder: Path) -> None:
    (folder / "a.txt").write_text("good text")
    for name in ("train.json", "notes.md", "table.csv", ".hidden"):
        (folder / name).write_text("{}")
    (folder / "more").mkdir()
    messages: list[str] = []
    stream_of(folder, messages)
    assert messages == [
        f"ignored in {folder}: 3 files ('notes.md', ...) and 1 subfolder ('more'); a file of JSON"
        " lines must be named .jsonl; read are .json.gz, .jsonl, .jsonl.gz, .parquet, .txt"
    ]
    config = DataConfig(source=str(folder), tokenizer="bytes")
    TrainingStream(
        config, ByteTokenizer(), batch_size=1, seed=0, rank=1, world_size=2, on_warning=pytest.fail
    )


def write_bad_files(folder: Path) -> None:
    (folder / "a.json.gz").write_bytes(b"plain text")
    (folder / "b.jsonl").write_text('{"body": "a", "id": 3}\n')
    (folder / "c.jsonl").write_text('{"text": 4}\n')
    (folder / "d.txt").write_bytes(b"caf\xe9")
    (folder / "e.parquet").write_bytes(b"PAR1 and no more")
    (folder / "f.txt").write_text("")
    (folder / "g.txt").write_text("\n \n")


PROBLEMS = (
    "a.json.gz: the file can't be read (not a gzip file: BadGzipFile: Not a gzipped file (b'pl'))",
    "b.jsonl line 1: the JSON object has no field 'text' (it has 'body', 'id'; data.text_key"
    " chooses one)",
    "c.jsonl line 1: 'text' is int, not a string",
    "d.txt line 1: not UTF-8 (byte 0xe9: unexpected end of data)",
    "e.parquet: the file can't be read (not a parquet file: ArrowInvalid: ",
    "f.txt is empty",
    "g.txt is empty",
)


def test_the_first_files_are_named_where_none_is_usable(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow.parquet")
    write_bad_files(tmp_path)
    source = folder_source(str(tmp_path))
    with pytest.raises(DataError) as caught:
        texts_of(source)
    start = f"the folder {tmp_path} has no usable document: "
    assert str(caught.value) == start + "; ".join([*PROBLEMS[:3], "and 4 more files"])
    for problem, path in zip(PROBLEMS, sorted(tmp_path.iterdir()), strict=True):
        alone = tmp_path / "alone"
        alone.mkdir()
        moved = path.rename(alone / path.name)
        with pytest.raises(DataError) as caught:
            texts_of(folder_source(str(alone)))
        assert f"no usable document: {problem}" in str(caught.value)
        moved.unlink()
        alone.rmdir()


def test_single_bad_files_are_told_and_further_ones_counted(folder: Path) -> None:
    pytest.importorskip("pyarrow.parquet")
    write_bad_files(folder)
    (folder / "z.txt").write_text("the only good file")
    messages: list[str] = []
    stream = stream_of(folder, messages)
    while stream.epoch < 2:
        next(stream)
    assert stream.skipped_documents in (14, 21)  # the last batch may have begun a third epoch
    *told, last = messages
    assert len(told) == 5
    for message, problem in zip(told, PROBLEMS, strict=False):
        assert f"{folder}/{problem}" in message
    assert last == "unusable records in further files are counted without a warning"


def test_validation_files_that_are_bad_are_told_too(folder: Path) -> None:
    (folder / "a.txt").write_text("good text")
    for number in range(9):
        (folder / f"bad-{number}.val.txt").write_bytes(b"\xff")
    messages: list[str] = []
    config = DataConfig(source=str(folder), tokenizer="bytes", sequence_length=8)
    found = ValidationSet(
        config, ByteTokenizer(), batch_size=1, tokens=9, on_warning=messages.append
    )
    assert found.skipped_documents == 9
    assert len(messages) == 6
    assert "bad-0.val.txt line 1: not UTF-8" in messages[0]
    assert "further files" in messages[-1]


def test_text_key_chooses_the_field_and_the_column(folder: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    (folder / "a.jsonl").write_text('{"text": "no", "body": "from a field"}\n')
    parquet.write_table(
        pyarrow.table({"text": ["no"], "body": ["from a column"]}), folder / "b.parquet"
    )
    expected = ["from a field", "from a column"]
    assert texts_of(folder_source(str(folder), "body")) == expected
    default, body = DataConfig(source=str(folder)), DataConfig(source=str(folder), text_key="body")
    assert data_fingerprint(default)["sha256"] != data_fingerprint(body)["sha256"]
    (folder / "a.jsonl").unlink()
    stream = stream_of(folder, [], text_key="content")
    with pytest.raises(DataError) as caught:
        next(stream)
    assert (
        "no usable training document: b.parquet: the file can't be read (there is no column"
        " 'content': it has 'text', 'body'; data.text_key chooses one)"
    ) in str(caught.value)


def test_text_key_where_there_are_no_fields_is_an_error(folder: Path) -> None:
    (folder / "a.txt").write_text("text")
    with pytest.raises(DataError, match=r"data\.text_key is 'body', but .* only \.txt files"):
        folder_source(str(folder), "body")
    with pytest.raises(DataError, match=r"data\.text_key is 'body', but the standard library"):
        data_fingerprint(DataConfig(text_key="body"))
    with pytest.raises(ValueError, match=r"data\.text_key must be a non-empty string, got ''"):
        DataConfig(text_key="")
