"""What can be wrong with training data, and what the stream makes of it."""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lowrank.trainers.data import DataConfig, DataError, DataWarning, TrainingStream
from lowrank.trainers.data.tokenizer_bytes import ByteTokenizer

EOS = ByteTokenizer.eos_id
CONFIG = DataConfig(tokenizer="bytes", sequence_length=16, shuffle_block=4)


def open_stream(corpus: Path, **options: Any) -> TrainingStream:
    config = replace(CONFIG, source=str(corpus), workers=options.pop("workers", 0))
    return TrainingStream(
        config, ByteTokenizer(), batch_size=options.pop("batch_size", 3), seed=5, **options
    )


def damaged(corpus: Path) -> None:
    """Two bad lines in one shard, a shard that is cut off, and an empty one."""
    (corpus / "c4-train.00000-of-00004.json.gz").unlink()
    (corpus / "c4-train.00000-of-00004.jsonl").write_text(
        '{"text": "good"}\n{"text": broken}\n{"body": "none"}\n{"text": "good too"}\n'
    )
    cut = corpus / "c4-train.00001-of-00004.json.gz"
    cut.write_bytes(cut.read_bytes()[:-40])
    (corpus / "c4-train.00002-of-00004.json.gz").write_bytes(b"")


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_data_are_counted_and_reported_once_per_file(corpus: Path, workers: int) -> None:
    damaged(corpus)
    messages: list[str] = []
    stream = open_stream(corpus, workers=workers, on_warning=messages.append)
    while stream.epoch == 0:
        next(stream)
    counted = stream.skipped_documents
    stream.close()
    first = {message.split(";")[0] for message in messages}
    assert len([m for m in first if "00000-of-00004.jsonl line 2: broken JSON" in m]) == 1
    assert (
        len([m for m in first if "00001-of-00004.json.gz: the file" in m and "EOFError" in m]) == 1
    )
    assert len([m for m in first if m.endswith("00002-of-00004.json.gz is empty")]) == 1
    # Two lines, the cut and the empty file; streams that are ahead have met them again.
    assert counted >= 4


def test_skips_are_counted_exactly_and_not_again_on_resume(corpus: Path) -> None:
    damaged(corpus)
    messages: list[str] = []
    # Unshuffled, so that the last shard of the epoch is a good one.
    config = replace(CONFIG, source=str(corpus), shuffle_block=0)
    stream = TrainingStream(
        config, ByteTokenizer(), batch_size=1, seed=5, on_warning=messages.append
    )
    while stream.epoch == 0:
        position = stream.state_dict()
        next(stream)
    assert position["streams"][0]["skipped"] == 4
    resumed = TrainingStream(
        config, ByteTokenizer(), batch_size=1, seed=5, on_warning=messages.append
    )
    resumed.load_state_dict(position)
    assert resumed.skipped_documents == 4
    next(resumed)
    assert resumed.skipped_documents == stream.skipped_documents


def test_warnings_are_issued_by_default(corpus: Path) -> None:
    damaged(corpus)
    stream = open_stream(corpus)
    with pytest.warns(DataWarning, match="skipped"):
        list(itertools.islice(stream, 50))


@pytest.mark.parametrize("workers", [0, 1])
def test_first_bad_document_is_an_error_when_asked(corpus: Path, workers: int) -> None:
    (corpus / "c4-train.00001-of-00004.json.gz").unlink()
    (corpus / "c4-train.00001-of-00004.jsonl").write_text('{"text": "good"}\nnonsense\n')
    config = replace(CONFIG, source=str(corpus), bad_documents="error", workers=workers)
    stream = TrainingStream(config, ByteTokenizer(), batch_size=3, seed=5)
    message = r"^[^\n]*00001-of-00004.jsonl line 2: broken JSON \([^\n]*\)$"
    with pytest.raises(DataError, match=message):
        list(itertools.islice(stream, 1000))


def test_data_without_any_document_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("nonsense\n")
    (tmp_path / "val.jsonl").write_text('{"text": "a"}\n')
    stream = open_stream(tmp_path, on_warning=lambda _: None)
    with pytest.raises(
        DataError,
        match=r"has no usable training document: train.jsonl line 1: broken JSON \([^()]*\)$",
    ):
        next(stream)


def test_stream_whose_shards_are_all_empty_goes_on_with_the_next_epochs(tmp_path: Path) -> None:
    (tmp_path / "train-0.jsonl").write_text('{"text": "the only document"}\n')
    (tmp_path / "train-1.jsonl").write_text("")
    (tmp_path / "val.jsonl").write_text('{"text": "a"}\n')
    for rank in range(2):
        stream = open_stream(tmp_path, rank=rank, world_size=2, on_warning=lambda _: None)
        text = bytes(token for token in next(stream).inputs.flatten().tolist() if token != EOS)
        assert b"the only document" in text


def test_fewer_documents_than_streams_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "val.jsonl").write_text('{"text": "a"}\n')
    next(open_stream(tmp_path, rank=0, world_size=2))
    with pytest.raises(DataError, match="for stream 1 of 2"):
        next(open_stream(tmp_path, rank=1, world_size=2))


def test_shard_that_vanishes_is_an_error(corpus: Path) -> None:
    stream = open_stream(corpus)
    for shard in corpus.glob("c4-train*"):
        shard.unlink()
    with pytest.raises(DataError, match="can't be read: No such file"):
        next(stream)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"world_size": 0}, "world_size must be"),
        ({"rank": 2, "world_size": 2}, "rank must be below world_size"),
    ],
)
def test_wrong_arguments_are_named(corpus: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_stream(corpus, **options)


@pytest.mark.parametrize("workers", [0, 1])
def test_missing_module_is_named(
    tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["a", "b"]}), tmp_path / "train.parquet")
    (tmp_path / "val.txt").write_text("a")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        DataError, match=r'^datasets is not installed .*lowrank-pretrain\[train\]"$'
    ):
        next(open_stream(tmp_path, workers=workers))
