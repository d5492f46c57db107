"""The validation text: the same tokens each time, and how many bytes they stand for."""

from __future__ import annotations

import warnings
from array import array
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .config import IGNORED, Batch, DataConfig
from .diagnosis import why_unusable
from .errors import BadDocumentError, DataError, DataWarning, FirstFew
from .records import Source, where
from .sequences import pad
from .source import open_source
from .stream import check_split
from .tokenizer import Tokenizer


class ValidationSet:
    """One rank's share of the validation tokens, as the same batches each time.

    Whole documents are taken in their order until the budget is reached. Packed, every token of
    theirs and the end-of-text token after each is predicted once, the first one from an
    end-of-text token before it. Padded, each document is one sequence, cut to its length.

    Sequence i belongs to rank ``i % world_size``. All ranks have equally many batches of equal
    shape; rows that only fill up predict nothing, so losses must be summed over tokens and ranks
    and divided by the sum of `tokens`.

    Args:
        config: The data and how it is cut.
        tokenizer: Turns it into ids.
        batch_size: Sequences per batch, B.
        tokens: Targets to predict over all ranks; exceeded by a part of the last document at most.
        rank: This process's number.
        world_size: How many processes share the set.
        on_warning: Takes one sentence for each of the first few files of which something was
            passed over, and one if the data holds fewer tokens than asked for; by default it is
            issued as a `DataWarning`.

    Attributes:
        tokens: Targets that this rank predicts.
        bytes: UTF-8 bytes of the text that these targets stand for; end-of-text tokens stand for
            none.
        documents: Documents taken, over all ranks.
        skipped_documents: Records passed over as unusable, over all ranks.

    Raises:
        ValueError: If an argument is out of range or the data can't be used.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: Tokenizer,
        *,
        batch_size: int,
        tokens: int,
        rank: int = 0,
        world_size: int = 1,
        on_warning: Callable[[str], None] | None = None,
    ) -> None:
        check_split(batch_size, rank, world_size)
        if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
            raise ValueError(f"the validation budget must be at least 1 token, got {tokens!r}")
        self._batch_size = batch_size
        report = on_warning or _warn
        strict = config.bad_documents == "error"
        passed_over: list[str] = []
        reader = _Reader(open_source(config), strict, FirstFew(passed_over.append))
        cut = _padded_rows if config.packing == "pad" else _packed_rows
        inputs, targets, byte_counts = cut(reader, tokenizer, config.sequence_length, tokens)
        self.documents = reader.documents
        self.skipped_documents = reader.skipped
        predicted = int((targets != IGNORED).sum())
        if predicted == 0 or not int(byte_counts.sum()):
            raise DataError(_nothing_found(reader))
        for message in passed_over:
            report(message)
        if predicted < tokens:
            report(
                f"the validation data holds {predicted} tokens, fewer than the {tokens} asked for; "
                "all of them are used"
            )
        mine = slice(rank, None, world_size)
        self.tokens = int((targets[mine] != IGNORED).sum())
        self.bytes = int(byte_counts[mine].sum())
        per_rank = -(-inputs.shape[0] // world_size)
        rows = -(-per_rank // batch_size) * batch_size
        self._inputs = _filled(inputs[mine], rows, tokenizer.eos_id)
        self._targets = _filled(targets[mine], rows, IGNORED)

    def __len__(self) -> int:
        """Batches, the same number on every rank."""
        return self._inputs.shape[0] // self._batch_size

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, self._inputs.shape[0], self._batch_size):
            rows = slice(start, start + self._batch_size)
            yield Batch(self._inputs[rows].to(torch.int64), self._targets[rows].to(torch.int64))


def _nothing_found(reader: _Reader) -> str:
    label = reader.source.label
    if reader.documents:
        return (
            f"the validation documents of {label} ({reader.documents}) are too short to predict "
            "a token; add text"
        )
    problems = why_unusable(reader.source, "validation")
    return f"{label} has no usable validation document: {problems}"


class _Reader:
    """The validation documents in order, with a count of those passed over."""

    def __init__(self, source: Source, strict: bool, report: Callable[[str], None]) -> None:
        self.source = source
        self.documents = 0
        self.skipped = 0
        self._strict = strict
        self._report = report

    def __iter__(self) -> Iterator[str]:
        for shard in self.source.shards("validation"):
            warned = False
            empty = True
            for record in self.source.records(shard):
                empty = False
                try:
                    if record.problem is not None:
                        raise BadDocumentError(record.problem)
                    text = self.source.text(shard, record)
                except BadDocumentError as error:
                    self._skip(f"{where(shard, record.number)}: {error}", warned)
                    warned = True
                    continue
                self.documents += 1
                yield text
            if empty and shard.share == "all":
                self._skip(f"{shard.name} is empty", False)

    def _skip(self, problem: str, warned: bool) -> None:
        if self._strict:
            raise DataError(problem)
        self.skipped += 1
        if not warned:
            self._report(f"{problem}; skipped (more of this file are counted without a warning)")


def _packed_rows(
    reader: _Reader, tokenizer: Tokenizer, length: int, budget: int
) -> tuple[Tensor, Tensor, Tensor]:
    # Arrays, not lists: ten million tokens as Python integers would take half a gigabyte.
    stream = array("i", [tokenizer.eos_id])
    counts = array("i", [0])
    for text in reader:
        document, document_bytes = tokenizer.encode_with_bytes(text)
        stream.extend((*document, tokenizer.eos_id))
        counts.extend((*document_bytes, 0))
        if len(stream) > budget:
            break
    predicted = len(stream) - 1
    rows = -(-predicted // length)
    filling = rows * length - predicted
    ids = torch.frombuffer(stream, dtype=torch.int32)
    byte_counts = torch.frombuffer(counts, dtype=torch.int32)[1:]
    ended = torch.full((filling,), tokenizer.eos_id, dtype=torch.int32)
    ignored = torch.full((filling,), IGNORED, dtype=torch.int32)
    none = torch.zeros(filling, dtype=torch.int32)
    inputs = torch.cat([ids[:-1], ended]).view(rows, length)
    targets = torch.cat([ids[1:], ignored]).view(rows, length)
    return inputs, targets, torch.cat([byte_counts, none]).view(rows, length).sum(dim=1)


def _padded_rows(
    reader: _Reader, tokenizer: Tokenizer, length: int, budget: int
) -> tuple[Tensor, Tensor, Tensor]:
    inputs, targets, byte_counts = array("i"), array("i"), array("q")
    predicted = 0
    for text in reader:
        document, document_bytes = tokenizer.encode_with_bytes(text)
        row_inputs, row_targets = pad(document, length, tokenizer.eos_id)
        inputs.extend(row_inputs)
        targets.extend(row_targets)
        # The first token is given, not predicted.
        byte_counts.append(sum(document_bytes[1 : length - 1]))
        predicted += min(len(document), length - 1)
        if predicted >= budget:
            break
    if not inputs:
        none = torch.empty(0, length, dtype=torch.int32)
        return none, none, torch.empty(0, dtype=torch.int64)
    return (
        torch.frombuffer(inputs, dtype=torch.int32).view(-1, length),
        torch.frombuffer(targets, dtype=torch.int32).view(-1, length),
        torch.frombuffer(byte_counts, dtype=torch.int64),
    )


def _filled(rows: Tensor, count: int, value: int) -> Tensor:
    filling = rows.new_full((count - rows.shape[0], rows.shape[1]), value)
    return torch.cat([rows, filling])


def _warn(message: str) -> None:
    warnings.warn(message, DataWarning, stacklevel=3)
