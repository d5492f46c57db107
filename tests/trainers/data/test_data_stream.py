from __future__ import annotations

import io
import itertools
import multiprocessing
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from memory_source import MemorySource

from lowrank.trainers.data import Batch, DataConfig, TrainingStream
from lowrank.trainers.data.cursor import Position
from lowrank.trainers.data.order import Plan
from lowrank.trainers.data.producer import Produced, produce
from lowrank.trainers.data.records import Record
from lowrank.trainers.data.tokenizer_bytes import ByteTokenizer

EOS = ByteTokenizer.eos_id
CONFIG = DataConfig(tokenizer="bytes", sequence_length=16, shuffle_block=4)


def batches(
    source: MemorySource,
    config: DataConfig,
    plan: Plan,
    *,
    batch_size: int = 2,
    state: dict[str, int] | None = None,
) -> Iterator[Produced]:
    return produce(config, source, ByteTokenizer(), plan, batch_size, state or Position().state())


def open_stream(corpus: Path, **options: Any) -> TrainingStream:
    config = replace(CONFIG, source=str(corpus), workers=options.pop("workers", 0))
    return TrainingStream(
        config, ByteTokenizer(), batch_size=options.pop("batch_size", 3), seed=5, **options
    )


def equal(left: Batch, right: Batch) -> bool:
    return torch.equal(left.inputs, right.inputs) and torch.equal(left.targets, right.targets)


def text_corpora() -> st.SearchStrategy[list[list[str | Record | None]]]:
    text = st.text(alphabet="ab \u00e9", min_size=1, max_size=50)
    shard = st.lists(st.one_of(text, st.none()), max_size=12)
    corpora = st.lists(shard, min_size=1, max_size=4)
    return corpora.map(lambda shards: [["first", *shards[0]], *shards[1:]])


# --- Packing ---------------------------------------------------------------------------------


@given(text_corpora(), st.integers(2, 40), st.integers(1, 3))
def test_packed_batches_are_the_documents_joined(
    contents: list[list[str | Record | None]], length: int, batch_size: int
) -> None:
    config = replace(CONFIG, sequence_length=length, shuffle_block=0)
    plan = Plan(0, 0, 1, len(contents), 0)
    texts = [text for shard in contents for text in shard if isinstance(text, str)]
    epoch = [token for text in texts for token in (*text.encode(), EOS)]
    expected = list(itertools.islice(itertools.cycle(epoch), 6 * batch_size * length + 1))
    source = MemorySource(contents)
    found = list(itertools.islice(batches(source, config, plan, batch_size=batch_size), 6))
    inputs = [token for item in found if item.batch for token in item.batch.inputs.flatten()]
    targets = [token for item in found if item.batch for token in item.batch.targets.flatten()]
    assert inputs == expected[:-1]
    assert targets == expected[1:]
    assert all(item.batch and item.batch.inputs.shape == (batch_size, length) for item in found)


def test_padded_documents_take_one_sequence_each() -> None:
    config = replace(CONFIG, packing="pad", sequence_length=6, shuffle_block=0)
    source = MemorySource([["ab", "abcdefgh"]])
    produced = next(batches(source, config, Plan(0, 0, 1, 1, 0)))
    assert produced.batch is not None
    a = ord("a")
    assert produced.batch.inputs.tolist() == [
        [a, a + 1, EOS, EOS, EOS, EOS],
        [a, a + 1, a + 2, a + 3, a + 4, EOS],
    ]
    assert produced.batch.targets.tolist() == [
        [a + 1, EOS, -100, -100, -100, -100],
        [a + 1, a + 2, a + 3, a + 4, EOS, -100],
    ]
    assert produced.batch.inputs.dtype == produced.batch.targets.dtype == torch.int64


# --- Exact resume ----------------------------------------------------------------------------


@given(
    contents=text_corpora(),
    length=st.integers(2, 40),
    block=st.sampled_from([0, 1, 3, 100]),
    packing=st.sampled_from(["pack", "pad"]),
    stop=st.integers(0, 25),
)
def test_resuming_anywhere_gives_the_very_same_batches(
    contents: list[list[str | Record | None]], length: int, block: int, packing: str, stop: int
) -> None:
    config = replace(CONFIG, sequence_length=length, shuffle_block=block, packing=packing)
    plan = Plan(1, 0, 1, len(contents), block)
    source = MemorySource(contents)
    through = list(itertools.islice(batches(source, config, plan), stop + 8))
    state = through[stop - 1].state if stop else Position().state()
    resumed = list(itertools.islice(batches(source, config, plan, state=state), 8))
    for expected, found in zip(through[stop:], resumed, strict=True):
        assert expected.batch is not None
        assert found.batch is not None
        assert equal(expected.batch, found.batch)
        assert expected.state == found.state


@given(contents=text_corpora(), streams=st.integers(2, 3), stop=st.integers(1, 12))
def test_resuming_a_part_of_the_data_gives_the_very_same_batches(
    contents: list[list[str | Record | None]], streams: int, stop: int
) -> None:
    contents = [["filling"] * streams + contents[0], *contents[1:]]
    plan = Plan(1, streams - 1, streams, 1, 4)
    source = MemorySource([[item for shard in contents for item in shard]])
    through = list(itertools.islice(batches(source, CONFIG, plan), stop + 4))
    resumed = itertools.islice(batches(source, CONFIG, plan, state=through[stop - 1].state), 4)
    for expected, found in zip(through[stop:], resumed, strict=True):
        assert expected.batch is not None
        assert found.batch is not None
        assert equal(expected.batch, found.batch)
        assert expected.state == found.state


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_saved_stream_goes_on_exactly(corpus: Path, workers: int) -> None:
    stream = open_stream(corpus, workers=workers)
    for _ in range(7):
        next(stream)
    buffer = io.BytesIO()
    torch.save(stream.state_dict(), buffer)
    expected = [next(stream) for _ in range(8)]
    after = stream.state_dict()
    stream.close()
    buffer.seek(0)
    resumed = open_stream(corpus, workers=workers)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    assert all(equal(next(resumed), batch) for batch in expected)
    assert resumed.state_dict() == after
    resumed.close()


def test_closing_ends_the_workers(corpus: Path) -> None:
    before = set(multiprocessing.active_children())
    stream = open_stream(corpus, workers=2)
    next(stream)
    assert len(set(multiprocessing.active_children()) - before) == 2
    stream.close()
    assert not set(multiprocessing.active_children()) - before


def test_real_text_resumes_exactly(real_text: Path) -> None:
    config = DataConfig(source=str(real_text), tokenizer="bytes", workers=1)
    stream = TrainingStream(config, ByteTokenizer(), batch_size=16, seed=0)
    for _ in range(40):
        next(stream)
    resumed = TrainingStream(config, ByteTokenizer(), batch_size=16, seed=0)
    resumed.load_state_dict(stream.state_dict())
    assert all(equal(next(stream), next(resumed)) for _ in range(3))
    stream.close()
    resumed.close()


def test_closed_stream_goes_on_when_asked(corpus: Path) -> None:
    stream, other = open_stream(corpus), open_stream(corpus)
    next(stream)
    next(other)
    stream.close()
    assert equal(next(stream), next(other))


def test_workers_give_the_batches_of_their_streams_in_turn(corpus: Path) -> None:
    stream = open_stream(corpus, workers=2)
    found = [next(stream) for _ in range(6)]
    stream.close()
    ranks = [open_stream(corpus, rank=rank, world_size=2) for rank in range(2)]
    assert all(equal(batch, next(ranks[i % 2])) for i, batch in enumerate(found))


def test_starting_workers_draws_nothing_from_the_global_generator(corpus: Path) -> None:
    stream = open_stream(corpus, workers=1)
    before = torch.get_rng_state()
    next(stream)
    stream.close()
    assert torch.equal(torch.get_rng_state(), before)


def test_epochs_repeat_the_documents_in_another_order(corpus: Path) -> None:
    stream = open_stream(corpus, batch_size=1)
    passes: dict[int, list[int]] = {0: [], 1: []}
    while stream.epoch < 2:
        epoch = stream.epoch
        passes[epoch] += next(stream).inputs.flatten().tolist()
    assert passes[0] != passes[1]
    assert abs(len(passes[0]) - len(passes[1])) <= 2 * CONFIG.sequence_length
    assert stream.skipped_documents == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"workers": 2}, "workers was 0 and is 2 now"),
        ({"world_size": 2}, "world_size was 1 and is 2 now"),
        ({"config": {"packing": "pad"}}, "packing was 'pack' and is 'pad' now"),
        ({"config": {"sequence_length": 8}}, "sequence_length was 16 and is 8 now"),
        ({"config": {"shuffle_block": 9}}, "shuffle_block was 4 and is 9 now"),
        ({"seed": 6}, "seed was 5 and is 6 now"),
    ],
)
def test_changed_settings_are_refused(corpus: Path, change: dict[str, Any], message: str) -> None:
    state = open_stream(corpus).state_dict()
    config = replace(
        CONFIG, source=str(corpus), workers=change.get("workers", 0), **change.get("config", {})
    )
    other = TrainingStream(
        config,
        ByteTokenizer(),
        batch_size=3,
        seed=change.get("seed", 5),
        world_size=change.get("world_size", 1),
    )
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(state)


def test_changed_data_are_refused_and_both_named(corpus: Path) -> None:
    state = open_stream(corpus).state_dict()
    (corpus / "c4-train.00004-of-00005.jsonl").write_text('{"text": "more"}\n')
    message = r"data was 'folder' [0-9a-f]{12} and is 'folder' [0-9a-f]{12} now"
    with pytest.raises(ValueError, match=message):
        open_stream(corpus).load_state_dict(state)


def test_another_python_is_other_data() -> None:
    config = replace(CONFIG, source="stdlib")
    state = TrainingStream(config, ByteTokenizer(), batch_size=3, seed=5).state_dict()
    state["data"] = {**state["data"], "python": "3.9.0", "sha256": "f" * 64}
    stream = TrainingStream(config, ByteTokenizer(), batch_size=3, seed=5)
    message = r"data was 'stdlib' of Python 3\.9\.0 f{12} and is 'stdlib' of Python \d"
    with pytest.raises(ValueError, match=message):
        stream.load_state_dict(state)


@pytest.mark.parametrize(
    "damage",
    [
        {"version": 0},
        {"streams": []},
        {"streams": [{"epoch": 0}]},
        {"streams": [{**Position().state(), "block": -5}]},
        {"next": 4},
    ],
)
def test_damaged_states_are_refused_and_change_nothing(
    corpus: Path, damage: dict[str, Any]
) -> None:
    stream = open_stream(corpus)
    next(stream)
    before = stream.state_dict()
    with pytest.raises(ValueError, match="saved data position"):
        stream.load_state_dict({**before, **damage})
    assert stream.state_dict() == before
