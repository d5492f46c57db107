"""Folders without a validation file: which documents are held out, whoever reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lowrank.trainers.data import DataConfig, DataError, TrainingStream, ValidationSet
from lowrank.trainers.data.files import FileSource, folder_source
from lowrank.trainers.data.records import Split
from lowrank.trainers.data.tokenizer_bpe import training_texts
from lowrank.trainers.data.tokenizer_bytes import ByteTokenizer

JsonLines = Callable[[Sequence[object]], bytes]
EOS = ByteTokenizer.eos_id


def texts_of(source: FileSource, split: Split) -> list[str]:
    return [
        source.text(shard, record)
        for shard in source.shards(split)
        for record in source.records(shard)
        if record.problem is None
    ]


def paragraphs(folder: Path, count: int) -> list[str]:
    """One short paragraph in each of so many files."""
    folder.mkdir(exist_ok=True)
    texts = [f"file {i:03d} has one paragraph and no more" for i in range(count)]
    for i, text in enumerate(texts):
        (folder / f"{i:03d}.txt").write_text(text + "\n")
    return texts


def config_of(folder: Path, **options: object) -> DataConfig:
    return replace(
        DataConfig(source=str(folder), tokenizer="bytes", sequence_length=16, shuffle_block=4),
        **options,  # type: ignore[arg-type]
    )


def epoch_of(folder: Path, rank: int = 0, world_size: int = 1) -> set[str]:
    """The documents of a rank's first epoch."""
    stream = TrainingStream(
        config_of(folder),
        ByteTokenizer(),
        batch_size=1,
        seed=0,
        rank=rank,
        world_size=world_size,
        on_warning=lambda text: pytest.fail(text),
    )
    tokens: list[int] = []
    while stream.epoch == 0:
        tokens += next(stream).inputs.flatten().tolist()
    assert stream.skipped_documents == 0
    documents = [[]]  # type: list[list[int]]
    for token in tokens:
        if token == EOS:
            documents.append([])
        else:
            documents[-1].append(token)
    return {bytes(document).decode() for document in documents[:-1]}


@pytest.mark.parametrize("count", [2, 6, 19, 20, 45])
def test_files_of_one_paragraph_hold_out_one_in_twenty(tmp_path: Path, count: int) -> None:
    texts = paragraphs(tmp_path, count)
    source = folder_source(str(tmp_path))
    validation, train = texts_of(source, "validation"), texts_of(source, "train")
    assert validation == (texts[19::20] or texts[-1:])
    assert sorted(train + validation) == texts
    assert sorted(training_texts(folder_source(str(tmp_path)))) == train


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_all_ranks_hold_out_the_same_and_train_on_the_rest(tmp_path: Path, world_size: int) -> None:
    texts = paragraphs(tmp_path, 6)
    seen = [epoch_of(tmp_path, rank, world_size) for rank in range(world_size)]
    assert set.union(*seen) == set(texts[:-1])
    held = [
        ValidationSet(
            config_of(tmp_path),
            ByteTokenizer(),
            batch_size=2,
            tokens=8,
            rank=rank,
            world_size=world_size,
        )
        for rank in range(world_size)
    ]
    targets = torch.cat([batch.targets.flatten() for one in held for batch in one])
    assert sum(one.tokens for one in held) == len(texts[-1]) + 1
    assert sorted(targets[targets >= 0].tolist()) == sorted([*texts[-1].encode(), EOS])


def test_short_files_are_counted_together(tmp_path: Path, json_lines: JsonLines) -> None:
    for shard in range(10):
        lines = json_lines([f"{shard}:{i}" for i in range(7)])
        (tmp_path / f"part-{shard}.jsonl").write_bytes(lines)
    source = folder_source(str(tmp_path))
    # The seventieth record ends the tenth file: none has (file + record) % 20 == 19.
    assert texts_of(source, "validation") == ["2:5", "5:4", "8:3"]
    assert len(texts_of(source, "train")) == 67


def test_unusable_records_are_not_what_is_held_out(tmp_path: Path, json_lines: JsonLines) -> None:
    bad = b'{"text": 1}'
    (tmp_path / "a.jsonl").write_bytes(json_lines(["one", "two", *[bad] * 17, bad, "three", bad]))
    (tmp_path / "b.jsonl.gz").write_bytes(b"no gzip")
    source = folder_source(str(tmp_path))
    shard = source.shards("validation")[0]
    assert [source.text(shard, record) for record in source.records(shard)] == ["three"]


def test_layouts_with_a_twentieth_record_stay_as_they_were(
    tmp_path: Path, json_lines: JsonLines
) -> None:
    for shard in range(3):
        lines = json_lines([f"{shard}:{i}" for i in range(45)])
        (tmp_path / f"part-{shard}.jsonl").write_bytes(lines)
    expected = [f"{s}:{r}" for s in range(3) for r in range(45) if (s + r) % 20 == 19]
    assert texts_of(folder_source(str(tmp_path)), "validation") == expected


def test_a_resumed_stream_goes_on(tmp_path: Path) -> None:
    paragraphs(tmp_path, 6)

    def opened(rank: int) -> TrainingStream:
        return TrainingStream(
            config_of(tmp_path), ByteTokenizer(), batch_size=1, seed=0, rank=rank, world_size=2
        )

    for rank in range(2):
        whole, first, second = opened(rank), opened(rank), opened(rank)
        expected = [next(whole).inputs.tolist() for _ in range(12)]
        found = [next(first).inputs.tolist() for _ in range(5)]
        second.load_state_dict(first.state_dict())
        found += [next(second).inputs.tolist() for _ in range(7)]
        assert found == expected


def test_positions_of_the_former_version_go_on_and_say_what_changed(corpus: Path) -> None:
    def opened(messages: list[str]) -> TrainingStream:
        return TrainingStream(
            config_of(corpus),
            ByteTokenizer(),
            batch_size=1,
            seed=0,
            world_size=3,
            on_warning=messages.append,
        )

    messages: list[str] = []
    whole = opened(messages)
    expected = [next(whole).inputs.tolist() for _ in range(9)]
    assert not messages
    first, second = opened(messages), opened(messages)
    for _ in range(4):
        next(first)
    state = first.state_dict()
    assert state.pop("rotated") is False
    state["version"] = 1
    second.load_state_dict(state)
    assert [next(second).inputs.tolist() for _ in range(5)] == expected[4:]
    (message,) = messages
    assert "NUL" in message


def test_one_document_says_what_to_do(tmp_path: Path) -> None:
    paragraphs(tmp_path, 1)
    (tmp_path / "b.jsonl").write_text('{"text": 3}\n')
    message = (
        r"one usable document \(unusable: b.jsonl line 1: 'text' is int, not a string\), which "
        "can't be trained on and held out for validation at once; add text, or a validation file"
    )
    with pytest.raises(DataError, match=message):
        texts_of(folder_source(str(tmp_path)), "train")


def test_a_file_whose_only_document_is_held_out_is_not_called_empty(tmp_path: Path) -> None:
    texts = paragraphs(tmp_path, 20)
    assert epoch_of(tmp_path) == set(texts[:19])
