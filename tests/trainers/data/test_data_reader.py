from __future__ import annotations

import gzip
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from lowrank.trainers.data.errors import DataError
from lowrank.trainers.data.reader import read_records
from lowrank.trainers.data.records import Format, Record, Shard

JsonLines = Callable[[Sequence[object]], bytes]


def read(path: Path, kind: Format = "json") -> list[Record]:
    return list(read_records(Shard(str(path), str(path), kind, 0)))


def test_records_carry_their_line_numbers(tmp_path: Path, json_lines: JsonLines) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(json_lines(["one", b"", "two", b"   ", b"{broken", "three"]))
    assert [record.number for record in read(path)] == [1, 3, 5, 6]


def test_last_line_needs_no_line_end(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n{"text": "two"}')
    assert len(read(path)) == 2


def test_long_shards_are_read_whole(tmp_path: Path, json_lines: JsonLines) -> None:
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(json_lines(["x" * 5000 + str(i) for i in range(200)])))
    records = read(path)
    assert [record.number for record in records] == list(range(1, 201))
    assert str(records[-1].payload).endswith('199", "url": "u"}')


def test_truncated_gzip_gives_what_it_holds_and_says_where_it_ends(
    tmp_path: Path, json_lines: JsonLines
) -> None:
    path = tmp_path / "a.json.gz"
    whole = gzip.compress(json_lines([f"{i} " + "y" * 400 for i in range(2000)]), compresslevel=0)
    path.write_bytes(whole[: len(whole) // 2])
    *good, last = read(path)
    assert len(good) > 700
    assert all(record.problem is None for record in good)
    assert last.number == len(good)
    assert last.problem is not None
    assert "rest of the file can't be read (EOFError" in last.problem


@pytest.mark.parametrize(
    "content", [b"this is no gzip", gzip.compress(b"x" * 99, mtime=0)[:-6] + b"\0" * 6]
)
def test_broken_gzip_is_one_problem(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.json.gz"
    path.write_bytes(content)
    last = read(path)[-1]
    assert last.problem is not None
    assert "BadGzipFile" in last.problem


def test_characters_and_broken_bytes_in_gzip_files_stay_what_they_are(tmp_path: Path) -> None:
    lines = [
        '{"text": "gr\u00fc\u00dfe"}'.encode(),
        '{"text": "\u2603"}'.encode(),
        b"\xff",
        b"next",
    ]
    for name in ("a.json.gz", "a.jsonl"):
        content = b"\n".join(lines)
        (tmp_path / name).write_bytes(
            gzip.compress(content, mtime=0) if name.endswith("gz") else content
        )
        assert [str(record.payload).encode("latin-1") for record in read(tmp_path / name)] == lines


def test_text_before_a_break_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.gz"
    whole = gzip.compress(b"a line of text\n" * 20_000, compresslevel=0, mtime=0)
    path.write_bytes(whole[: len(whole) // 2])
    *good, last = read(path, "text")
    lines = sum(str(record.payload).count("\n") + 1 for record in good)
    assert last.problem is not None
    assert last.number == lines
    assert lines > 8_000


def test_empty_files_have_no_records(tmp_path: Path) -> None:
    (tmp_path / "a.json.gz").write_bytes(b"")
    (tmp_path / "b.jsonl").write_bytes(b"")
    assert read(tmp_path / "a.json.gz") == []
    assert read(tmp_path / "b.jsonl") == []


def test_broken_parquet_files_are_one_problem(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    good, other = tmp_path / "good.parquet", tmp_path / "other.parquet"
    parquet.write_table(pyarrow.table({"text": ["one", None, "three"]}), good)
    assert [record.payload for record in read(good, "parquet")] == ["one", None, "three"]
    parquet.write_table(pyarrow.table({"body": ["one"]}), other)
    (problem,) = read(other, "parquet")
    assert "no column 'text': it has 'body'; data.text_key" in str(problem.problem)
    good.write_bytes(good.read_bytes()[:100])
    (problem,) = read(good, "parquet")
    assert "the file can't be read (not a parquet file" in str(problem.problem)


def test_missing_file_and_pattern_characters_are_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone.jsonl can't be read: No such file"):
        read(tmp_path / "gone.jsonl")
    folder = tmp_path / "run [1]"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text": "a"}')
    assert len(read(folder / "a.jsonl")) == 1
    (folder / "a.parquet").write_bytes(b"")
    with pytest.raises(DataError, match=r"holds '\[', which streaming takes for a pattern"):
        read(folder / "a.parquet", "parquet")


@pytest.mark.parametrize(
    "name", ["with space", "with#hash", "with%20percent", "\u00fcmlaut", "a+b{c}"]
)
def test_unusual_folder_names_are_read(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text": "a"}')
    assert len(read(folder / "a.jsonl")) == 1


def test_local_files_ask_nothing_of_the_network(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def refuse(*arguments: object, **options: object) -> None:
        asked.append(arguments)
        raise OSError("no network here")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert len(read(corpus / "c4-train.00000-of-00004.json.gz")) == 50
    assert asked == []


def test_loads_are_not_counted_on_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["one"]}), tmp_path / "a.parquet")
    load_dataset = datasets.load_dataset
    counting: list[bool] = []

    def watched(*arguments: object, **options: object) -> object:
        counting.append(datasets.config.HF_UPDATE_DOWNLOAD_COUNTS)
        return load_dataset(*arguments, **options)

    monkeypatch.setattr(datasets, "load_dataset", watched)
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", True)
    read(tmp_path / "a.parquet", "parquet")
    assert counting == [False]
    assert datasets.config.HF_UPDATE_DOWNLOAD_COUNTS is True
