from __future__ import annotations

import gzip
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from lowrank.trainers.data import DataConfig, DataError, data_fingerprint
from lowrank.trainers.data.files import FileSource, folder_source
from lowrank.trainers.data.records import Split

JsonLines = Callable[[Sequence[object]], bytes]


def texts_of(source: FileSource, split: Split) -> list[str]:
    return [
        source.text(shard, record)
        for shard in source.shards(split)
        for record in source.records(shard)
    ]


def names_of(source: FileSource, split: Split) -> list[str]:
    return [Path(shard.name).name for shard in source.shards(split)]


def test_c4_layout_is_read_in_order(corpus: Path) -> None:
    source = folder_source(str(corpus))
    texts = texts_of(source, "train")
    assert len(texts) == 200
    assert texts[0].startswith("shard 0 document 0")
    assert texts[-1].startswith("shard 3 document 49")
    assert len(texts_of(source, "validation")) == 40


def test_every_format_is_read(tmp_path: Path, json_lines: JsonLines) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "a.jsonl").write_bytes(json_lines(["plain"]))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(json_lines(["zipped"])))
    (tmp_path / "c.json.gz").write_bytes(gzip.compress(json_lines(["as C4"])))
    parquet.write_table(
        pyarrow.table({"id": [1, 2], "text": ["row one", "row two"]}), tmp_path / "d.parquet"
    )
    (tmp_path / "e.txt").write_bytes("first line\r\nsecond l\u00efne\r\n".encode())
    (tmp_path / "my_val.jsonl").write_bytes(json_lines(["held out"]))
    (tmp_path / "notes.md").write_text("no data")
    (tmp_path / ".hidden.txt").write_text("no data")
    source = folder_source(str(tmp_path))
    assert texts_of(source, "train") == [
        "plain",
        "zipped",
        "as C4",
        "row one",
        "row two",
        "first line\nsecond l\u00efne",
    ]
    assert texts_of(source, "validation") == ["held out"]


def test_names_decide_the_split_word_by_word(tmp_path: Path) -> None:
    names = ["train.txt", "valley.txt", "interval-1.txt", "valid-0.txt", "x.validation.txt"]
    for name in names:
        (tmp_path / name).write_text("text")
    source = folder_source(str(tmp_path))
    assert names_of(source, "train") == ["interval-1.txt", "train.txt", "valley.txt"]
    assert names_of(source, "validation") == ["valid-0.txt", "x.validation.txt"]


def test_without_a_validation_file_every_twentieth_record_is_held_out(
    tmp_path: Path, json_lines: JsonLines
) -> None:
    for shard in range(2):
        lines = json_lines([f"{shard}:{i}" for i in range(100)])
        (tmp_path / f"part-{shard}.jsonl").write_bytes(lines)
    source = folder_source(str(tmp_path))
    train, validation = texts_of(source, "train"), texts_of(source, "validation")
    assert len(validation) == 10
    assert validation[:2] == ["0:19", "0:39"]
    assert not set(train) & set(validation)
    assert len(train) + len(validation) == 200


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "holds nothing .accepted: .json.gz, .jsonl"),
        (["a.md"], r"holds no usable file, but 1 file \('a.md'\) \(accepted"),
        (["c4-validation.jsonl"], "validation files but no training file"),
        (["train.jsonl", "test.jsonl"], "looks like a test split"),
    ],
)
def test_unusable_folders_say_why(tmp_path: Path, names: list[str], message: str) -> None:
    for name in names:
        (tmp_path / name).write_text("{}")
    with pytest.raises(DataError, match=message):
        folder_source(str(tmp_path))


def test_missing_folder_file_and_subfolder_say_why(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'stdlb' is neither 'stdlib', 'c4' nor an existing folder"):
        folder_source("stdlb")
    (tmp_path / "a.jsonl").write_text("{}")
    with pytest.raises(DataError, match="is a file; give the folder"):
        folder_source(str(tmp_path / "a.jsonl"))
    (tmp_path / "outer" / "en").mkdir(parents=True)
    with pytest.raises(DataError, match="did you mean its subfolder 'en'"):
        folder_source(str(tmp_path / "outer"))


def test_fingerprint_follows_names_and_sizes_but_not_the_place(corpus: Path) -> None:
    before = data_fingerprint(DataConfig(source=str(corpus)))
    assert before["train_shards"] == 4
    assert before["validation_shards"] == 1
    moved = corpus.rename(corpus.with_name("moved"))
    assert data_fingerprint(DataConfig(source=str(moved))) == before
    with (moved / "c4-train.00000-of-00004.json.gz").open("ab") as file:
        file.write(b"x")
    assert data_fingerprint(DataConfig(source=str(moved)))["sha256"] != before["sha256"]
