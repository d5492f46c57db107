"""The division of data among streams, and its order: pure functions of seed, epoch and stream."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """One stream's part of the training split.

    Rank r's worker w is stream ``r * workers + w``. With at least as many shards as streams, and
    evenly many, a stream reads whole shards, else every stream reads all shards and takes its
    records in turn. Either way all streams together see every document exactly once per epoch.

    Where shards have fewer records than there are streams, turns that begin anew with each shard
    would leave the last streams without any: there they go on from shard to shard (`rotated`).

    Attributes:
        seed: Of the order.
        stream: This stream's number, from 0.
        streams: How many there are.
        shards: How many shards there are.
        block: Documents that are shuffled among themselves; 0 or 1 keeps the order.
        rotated: Whether shard i's first record is stream ``i % streams``'s turn, not stream 0's.
    """

    seed: int
    stream: int
    streams: int
    shards: int
    block: int
    rotated: bool = False

    @property
    def whole_shards(self) -> bool:
        """Whether streams read whole shards."""
        return self.shards >= self.streams and self.shards % self.streams == 0

    @property
    def patience(self) -> int:
        """Epochs without a usable document before the stream gives up.

        None, unless the next epoch deals it other shards: that its own few are all broken doesn't
        mean that the data are.
        """
        return 15 if self.whole_shards and self.streams > 1 and self.block > 1 else 0

    @property
    def span(self) -> int:
        """Records of a shard in one block; of these the stream owns the block's documents."""
        documents = self.block if self.block > 1 else 256
        return documents if self.whole_shards else documents * self.streams

    def shard_order(self, epoch: int) -> list[int]:
        """The shards that this stream reads in an epoch, in order."""
        order = list(range(self.shards))
        if self.block > 1:
            order = permutation(self.shards, self.seed, "shards", epoch)
        return order[self.stream :: self.streams] if self.whole_shards else order

    def owns(self, shard: int, ordinal: int) -> bool:
        """Whether a record of a shard that the stream reads is the stream's own."""
        if self.whole_shards:
            return True
        turn = ordinal + shard if self.rotated else ordinal
        return turn % self.streams == self.stream

    def block_order(self, documents: int, epoch: int, shard: int, block: int) -> list[int]:
        """The order of a block's documents."""
        if self.block <= 1:
            return list(range(documents))
        return permutation(documents, self.seed, "block", epoch, shard, block, self.stream)


def permutation(count: int, *key: int | str) -> list[int]:
    """A permutation that depends on nothing but its arguments, on every Python version.

    Args:
        count: Its length.
        key: What chooses it.

    Returns:
        The numbers from 0 to ``count - 1`` in another order.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    # Of the generator's methods, random() alone is promised never to change.
    generator = random.Random(int.from_bytes(digest[:16], "little"))
    keys = [generator.random() for _ in range(count)]
    return sorted(range(count), key=keys.__getitem__)
