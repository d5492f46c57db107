from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from memory_source import MemorySource

from lowrank.trainers.data.cursor import Cursor, Position
from lowrank.trainers.data.order import Plan, permutation
from lowrank.trainers.data.tokenizer_bytes import ByteTokenizer


def first_epoch(source: MemorySource, plan: Plan) -> list[str]:
    """The documents of one stream's first epoch, in its order."""
    warnings: list[str] = []
    cursor = Cursor(
        source,
        plan,
        ByteTokenizer(),
        strict=False,
        position=Position(),
        report=warnings.append,
    )
    found = []
    while True:
        document = cursor.document()
        if cursor.position.epoch > 0:
            return found
        found.append(bytes(document).decode())
        cursor.advance()


@given(
    sizes=st.lists(st.integers(0, 23), min_size=1, max_size=9),
    streams=st.integers(1, 6),
    block=st.sampled_from([0, 1, 2, 5, 64]),
    seed=st.integers(0, 9),
)
def test_all_streams_together_see_every_document_once(
    sizes: list[int], streams: int, block: int, seed: int
) -> None:
    # A document for every stream in each shard, so that none is without.
    contents = [[f"{i}.{j}" for j in range(size + streams)] for i, size in enumerate(sizes)]
    source = MemorySource(contents)
    seen: Counter[str] = Counter()
    for stream in range(streams):
        seen.update(first_epoch(source, Plan(seed, stream, streams, len(contents), block)))
    assert seen == Counter(text for shard in contents for text in shard)


def test_whole_shards_only_when_they_divide_evenly() -> None:
    assert Plan(0, 1, 4, 1024, 8).whole_shards
    assert not Plan(0, 1, 3, 1024, 8).whole_shards
    assert not Plan(0, 1, 4, 2, 8).whole_shards
    assert len(Plan(0, 1, 4, 1024, 8).shard_order(0)) == 256
    assert len(Plan(0, 1, 3, 1024, 8).shard_order(0)) == 1024


def test_block_holds_as_many_documents_of_the_streams_own_either_way() -> None:
    for plan in (Plan(0, 1, 4, 8, 50), Plan(0, 1, 4, 2, 50)):
        assert sum(plan.owns(0, ordinal) for ordinal in range(plan.span)) == 50


def test_shuffling_depends_on_seed_and_epoch_and_stays_within_blocks() -> None:
    source = MemorySource([[f"{i:03d}" for i in range(100)]])
    orders = [first_epoch(source, Plan(seed, 0, 1, 1, 25)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    assert sorted(orders[0][:25]) == [f"{i:03d}" for i in range(25)]
    assert orders[0][:25] != sorted(orders[0][:25])
    plan = Plan(0, 0, 1, 50, 25)
    assert plan.shard_order(0) != plan.shard_order(1)
    assert plan.block_order(25, 0, 0, 0) != plan.block_order(25, 1, 0, 0)


@pytest.mark.parametrize("block", [0, 1])
def test_no_shuffling_keeps_the_order(block: int) -> None:
    contents = [[f"{i}.{j:03d}" for j in range(300)] for i in range(3)]
    plan = Plan(7, 0, 1, 3, block)
    expected = [text for shard in contents for text in shard]
    assert first_epoch(MemorySource(contents), plan) == expected


def test_permutation_never_changes() -> None:
    # A saved position is only as good as the order that it counts in.
    assert permutation(8, 1, "block", 0, 2) == [4, 5, 6, 7, 2, 0, 3, 1]
    assert sorted(permutation(1000, 5)) == list(range(1000))
