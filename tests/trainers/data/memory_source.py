"""A corpus in memory, for properties that are tested on many of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lowrank.trainers.data.errors import BadDocumentError
from lowrank.trainers.data.records import Record, Shard, Split


class MemorySource:
    """Shards of texts; ``None`` is an unusable record, a `Record` stands for itself."""

    name = "memory"
    label = "the memory"

    def __init__(self, shards: Sequence[Sequence[str | Record | None]]) -> None:
        self._contents = shards

    def shards(self, split: Split) -> Sequence[Shard]:
        return [Shard(f"shard {i}", str(i), "json", i) for i in range(len(self._contents))]

    def records(self, shard: Shard) -> Iterator[Record]:
        for number, item in enumerate(self._contents[shard.index], start=1):
            yield item if isinstance(item, Record) else Record(number, item)

    def text(self, shard: Shard, record: Record) -> str:
        if not isinstance(record.payload, str):
            raise BadDocumentError("no text")
        return record.payload

    def fingerprint(self) -> dict[str, str | int]:
        return {"source": self.name, "sha256": "0" * 64}
