"""Walks a stream's documents, epoch after epoch, from any saved position."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, fields, replace
from itertools import islice

from .diagnosis import why_unusable
from .errors import BadDocumentError, DataError
from .order import Plan
from .records import Record, Shard, Source, where
from .tokenizer import Tokenizer

# Documents that are tokenised in one call: enough to use its threads, few enough to start quickly.
_GROUP = 64


@dataclass(frozen=True)
class Position:
    """Where a stream stands between two batches: a handful of integers.

    Attributes:
        epoch: Passes completed.
        shard: Shards of this epoch's order completed.
        block: Blocks of the shard completed.
        document: Documents of the block completed, in their shuffled order.
        offset: Tokens of the next document consumed.
        carry: The last token of the last sequence, which opens the next; -1 for none.
        loaded: 1 once the block was read, so that reading it again counts nothing twice.
        found: Usable documents read in this epoch.
        barren: Epochs in a row without one.
        skipped: Records passed over since the beginning.
    """

    epoch: int = 0
    shard: int = 0
    block: int = 0
    document: int = 0
    offset: int = 0
    carry: int = -1
    loaded: int = 0
    found: int = 0
    barren: int = 0
    skipped: int = 0

    def state(self) -> dict[str, int]:
        """As plain integers."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: dict[str, int]) -> Position:
        """From what `state` gave.

        Raises:
            ValueError: If it is something else.
        """
        names = {field.name for field in fields(cls)}
        if not isinstance(state, dict) or set(state) != names:
            raise ValueError(
                f"a saved data position must have the keys {sorted(names)}, got {state!r}"
            )
        wrong = [name for name, value in state.items() if not isinstance(value, int) or value < -1]
        if wrong:
            raise ValueError(
                f"the saved data position has no valid {wrong[0]}: {state[wrong[0]]!r}"
            )
        return cls(**state)


class Cursor:
    """One stream's endless sequence of tokenised documents.

    Args:
        source: The data.
        plan: This stream's part of it.
        tokenizer: Turns documents into ids; the end-of-text token is not added.
        strict: Whether an unusable record raises instead of being counted.
        position: Where to start.
        report: Takes each warning; called once for each shard that has unusable records, and for
            each that breaks off.
    """

    def __init__(
        self,
        source: Source,
        plan: Plan,
        tokenizer: Tokenizer,
        *,
        strict: bool,
        position: Position,
        report: Callable[[str], None],
    ) -> None:
        self.position = position
        self._source = source
        self._plan = plan
        self._tokenizer = tokenizer
        self._strict = strict
        self._report = report
        self._shards = source.shards("train")
        self._order = plan.shard_order(position.epoch)
        self._records: Generator[tuple[int, Record], None, None] | None = None
        self._texts: list[str] | None = None
        self._last_block = False
        self._tokens: dict[int, list[int]] = {}
        self._warned: set[str] = set()

    def document(self) -> list[int]:
        """The token ids of the document at the position.

        Raises:
            DataError: If there is no usable document for this stream, or reading fails.
        """
        if self._texts is None:
            self._load()
        while self._texts is not None and self.position.document >= len(self._texts):
            self._next_block()
            self._load()
        texts, index = self._texts or [], self.position.document
        if index not in self._tokens:
            group = texts[index : index + _GROUP]
            self._tokens = dict(enumerate(self._tokenizer.encode_batch(group), start=index))
        return self._tokens[index]

    def advance(self) -> None:
        """Go on to the next document."""
        self.position = replace(self.position, document=self.position.document + 1, offset=0)

    def _next_block(self) -> None:
        at = self.position
        if not self._last_block:
            self.position = replace(at, block=at.block + 1, document=0, offset=0, loaded=0)
            return
        if self._records is not None:
            self._records.close()
            self._records = None
        self.position = replace(at, shard=at.shard + 1, block=0, document=0, offset=0, loaded=0)
        if self.position.shard < len(self._order):
            return
        barren = 0 if at.found else at.barren + 1
        if barren > self._plan.patience:
            raise DataError(self._nothing_found())
        self.position = replace(self.position, epoch=at.epoch + 1, shard=0, found=0, barren=barren)
        self._order = self._plan.shard_order(self.position.epoch)

    def _nothing_found(self) -> str:
        plan = self._plan
        if plan.streams > 1:
            return (
                f"{self._source.label} has no usable training document for stream "
                f"{plan.stream} of {plan.streams} (ranks times workers); use fewer workers "
                "or more data"
            )
        problems = why_unusable(self._source, "train")
        return f"{self._source.label} has no usable training document: {problems}"

    def _load(self) -> None:
        """Read the block at the position."""
        plan, at = self._plan, self.position
        index = self._order[at.shard]
        shard = self._shards[index]
        start = at.block * plan.span
        if self._records is None:
            self._records = _numbered(self._source.records(shard), start)
        texts = []
        read = skipped = 0
        count = at.loaded == 0
        for ordinal, record in islice(self._records, plan.span):
            read += 1
            if not plan.owns(index, ordinal):
                continue
            try:
                if record.problem is not None:
                    raise BadDocumentError(record.problem)
                texts.append(self._source.text(shard, record))
            except BadDocumentError as error:
                skipped += 1
                if count:
                    self._complain(shard, f"{where(shard, record.number)}: {error}", record)
        self._last_block = read < plan.span
        if (
            read == 0
            and at.block == 0
            and (plan.whole_shards or index % plan.streams == plan.stream)
            and self._is_empty(shard)
        ):
            skipped += 1
            if count:
                self._complain(shard, f"{shard.name} is empty", None)
        order = plan.block_order(len(texts), at.epoch, index, at.block)
        self._texts = [texts[i] for i in order]
        self._tokens = {}
        if count:
            self.position = replace(
                at, loaded=1, found=at.found + len(texts), skipped=at.skipped + skipped
            )

    def _is_empty(self, shard: Shard) -> bool:
        """Whether a shard that gave nothing holds nothing, or all of it is held out."""
        if shard.share == "all":
            return True
        return next(iter(self._source.records(replace(shard, share="all"))), None) is None

    def _complain(self, shard: Shard, problem: str, record: Record | None) -> None:
        if self._strict:
            raise DataError(problem)
        broken = record is None or record.problem is not None
        if broken:
            self._report(f"{problem}; skipped")
        elif shard.name not in self._warned:
            self._warned.add(shard.name)
            self._report(f"{problem}; skipped (more of this file are counted without a warning)")


def _numbered(records: Iterator[Record], start: int) -> Generator[tuple[int, Record], None, None]:
    """Records with their number in the shard, from ``start`` on; closes the reader with itself."""
    if isinstance(records, Generator):
        with closing(records):
            yield from islice(enumerate(records), start, None)
    else:
        yield from islice(enumerate(records), start, None)
