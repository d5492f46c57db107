from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lowrank.trainers.data import (
    DataConfig,
    DataError,
    DataWarning,
    ValidationSet,
    build_tokenizer,
)
from lowrank.trainers.data.tokenizer_bytes import ByteTokenizer

EOS = ByteTokenizer.eos_id


def config_of(folder: Path, **options: object) -> DataConfig:
    return DataConfig(source=str(folder), tokenizer="bytes", sequence_length=16, **options)  # type: ignore[arg-type]


def predicted(found: ValidationSet) -> list[int]:
    """The targets that are predicted, in order."""
    targets = torch.cat([batch.targets.flatten() for batch in found])
    return [int(token) for token in targets[targets != -100]]


def test_whole_documents_up_to_the_budget_and_every_token_once(corpus: Path) -> None:
    found = ValidationSet(config_of(corpus), ByteTokenizer(), batch_size=4, tokens=100)
    texts = [f"validation document {i} \N{SNOWMAN}" for i in range(found.documents)]
    expected = [token for text in texts for token in (*text.encode(), EOS)]
    assert predicted(found) == expected
    assert found.tokens == len(expected)
    assert found.tokens - len(texts[-1].encode()) - 1 < 100 <= found.tokens
    assert found.bytes == sum(len(text.encode()) for text in texts)
    first = next(iter(found))
    assert first.inputs[0, 0] == EOS
    assert first.inputs[0, 1:].tolist() == first.targets[0, :-1].tolist()


def test_batches_are_the_same_each_time(corpus: Path) -> None:
    found = ValidationSet(config_of(corpus), ByteTokenizer(), batch_size=4, tokens=300)
    again = ValidationSet(config_of(corpus), ByteTokenizer(), batch_size=4, tokens=300)
    for left, middle, right in zip(found, found, again, strict=True):
        assert left.inputs.shape == (4, 16)
        assert torch.equal(left.inputs, middle.inputs)
        assert torch.equal(left.targets, right.targets)


@pytest.mark.parametrize("packing", ["pack", "pad"])
@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_ranks_together_equal_one_process(corpus: Path, packing: str, world_size: int) -> None:
    config = config_of(corpus, packing=packing)
    whole = ValidationSet(config, ByteTokenizer(), batch_size=4, tokens=400)
    parts = [
        ValidationSet(
            config, ByteTokenizer(), batch_size=4, tokens=400, rank=rank, world_size=world_size
        )
        for rank in range(world_size)
    ]

    def rows(found: ValidationSet) -> list[tuple[int, ...]]:
        pairs = torch.cat([torch.cat([b.inputs, b.targets], dim=1) for b in found])
        return [tuple(row) for row in pairs.tolist() if any(t != -100 for t in row[16:])]

    assert sorted(row for part in parts for row in rows(part)) == sorted(rows(whole))
    assert sum(part.tokens for part in parts) == whole.tokens
    assert sum(part.bytes for part in parts) == whole.bytes
    assert len({len(part) for part in parts}) == 1
    assert all(len(predicted(part)) == part.tokens for part in parts)


def test_padded_bytes_are_those_of_the_predicted_tokens(corpus: Path) -> None:
    config = config_of(corpus, packing="pad")
    found = ValidationSet(config, ByteTokenizer(), batch_size=4, tokens=45)
    # Of each 16 tokens the first is given and the last ends the text.
    assert found.documents == 3
    assert found.tokens == 3 * 15
    assert found.bytes == 3 * 14


def test_bytes_do_not_depend_on_the_tokenizer(corpus: Path) -> None:
    everything = 10**9
    with pytest.warns(DataWarning, match="fewer than the 1000000000 asked for"):
        plain = ValidationSet(config_of(corpus), ByteTokenizer(), batch_size=4, tokens=everything)
    config = DataConfig(source=str(corpus), tokenizer="bpe", sequence_length=16)
    tokenizer = build_tokenizer(config, 300)
    with pytest.warns(DataWarning, match="fewer than"):
        merged = ValidationSet(config, tokenizer, batch_size=4, tokens=everything)
    assert merged.bytes == plain.bytes
    assert merged.tokens < plain.tokens


def test_bad_documents_are_counted_or_an_error(corpus: Path) -> None:
    (corpus / "a-validation.jsonl").write_text('{"text": "a"}\nnonsense\n[]\n')
    messages: list[str] = []
    found = ValidationSet(
        config_of(corpus), ByteTokenizer(), batch_size=4, tokens=50, on_warning=messages.append
    )
    assert found.skipped_documents == 2
    (message,) = messages
    assert "a-validation.jsonl line 2: broken JSON" in message
    with pytest.raises(DataError, match=r"a-validation.jsonl line 2: broken JSON"):
        ValidationSet(
            config_of(corpus, bad_documents="error"), ByteTokenizer(), batch_size=4, tokens=50
        )


@pytest.mark.parametrize("packing", ["pack", "pad"])
def test_no_document_is_an_error(tmp_path: Path, packing: str) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "val-1.jsonl").write_text('{"text": 3}\n')
    (tmp_path / "val-2.jsonl").write_text("")
    message = (
        "no usable validation document: val-1.jsonl line 1: 'text' is int, not a string; "
        "val-2.jsonl is empty$"
    )
    with pytest.raises(DataError, match=message):
        ValidationSet(
            config_of(tmp_path, packing=packing),
            ByteTokenizer(),
            batch_size=4,
            tokens=50,
            on_warning=pytest.fail,
        )


def test_documents_too_short_to_predict_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("text to train on")
    (tmp_path / "val.txt").write_text("a")
    config = config_of(tmp_path, packing="pad")
    with pytest.raises(
        DataError, match=r"validation documents of .* \(1\) are too short to predict"
    ):
        ValidationSet(config, ByteTokenizer(), batch_size=4, tokens=50, on_warning=pytest.fail)


def test_wrong_budget_is_named(corpus: Path) -> None:
    with pytest.raises(ValueError, match="at least 1 token, got 0"):
        ValidationSet(config_of(corpus), ByteTokenizer(), batch_size=4, tokens=0)
