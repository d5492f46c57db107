"""Processes divide a step's sequences, and all together get the same ones whatever their number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank.trainers.data import DataConfig, TrainingShare, build_tokenizer

SHAPE = {"batch_size": 4, "accumulation": 3}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    folder = tmp_path_factory.mktemp("data")
    for name, count in (("train", 40), ("other", 30), ("validation", 5)):
        text = "\n\n".join(f"{name} {index} " * 7 for index in range(count))
        (folder / f"{name}.txt").write_text(text)
    return DataConfig(source=str(folder), tokenizer="bytes", sequence_length=16)


def share(config: DataConfig, shards: int, rank: int = 0, size: int = 1) -> TrainingShare:
    return TrainingShare(
        config,
        build_tokenizer(config, 257),
        seed=1,
        shards=shards,
        rank=rank,
        world_size=size,
        on_warning=lambda _: None,
        **SHAPE,
    )


def all_shares(config: DataConfig, shards: int, size: int) -> list[TrainingShare]:
    return [share(config, shards, rank, size) for rank in range(size)]


def step_rows(shares: list[TrainingShare]) -> torch.Tensor:
    return torch.cat([batch.inputs for item in shares for batch in item.step()])


def positions(shares: list[TrainingShare]) -> dict[int, dict[str, Any]]:
    return {number: state for item in shares for number, state in item.state_dict().items()}


@pytest.mark.parametrize(
    ("shards", "size"), [(1, 2), (1, 3), (1, 6), (1, 12), (2, 2), (2, 3), (2, 4), (2, 8)]
)
def test_a_step_has_the_same_rows_for_any_number_of_processes(
    config: DataConfig, shards: int, size: int
) -> None:
    one, several = [share(config, shards)], all_shares(config, shards, size)
    for _ in range(4):
        torch.testing.assert_close(step_rows(several), step_rows(one), rtol=0, atol=0)
    assert positions(several) == positions(one)
    # And from a saved position on other numbers of processes, both ways.
    for before, after in ((one, several), (several, one)):
        resumed = all_shares(config, shards, len(after))
        for item in resumed:
            item.load_state_dict(positions(before))
        torch.testing.assert_close(step_rows(resumed), step_rows(after), rtol=0, atol=0)
        step_rows(before)


def test_as_many_processes_as_shards_have_a_stream_each(config: DataConfig) -> None:
    for rank, item in enumerate(all_shares(config, 2, 2)):
        assert list(item.state_dict()) == [rank]
        assert [tuple(batch.inputs.shape) for batch in item.step()] == [(4, 16)] * 3


def test_no_micro_batch_is_larger_than_set_and_all_processes_have_as_many(
    config: DataConfig,
) -> None:
    counts = {
        tuple(batch.inputs.shape[0] for batch in item.step()) for item in all_shares(config, 2, 4)
    }
    assert counts == {(4, 2)}


def test_each_stream_is_told_and_counted_by_one_process(config: DataConfig) -> None:
    owners = [list(item.state_dict()) for item in all_shares(config, 2, 6)]
    assert owners == [[0], [], [], [1], [], []]


def test_processes_that_do_not_divide_a_step_are_refused_with_the_numbers(
    config: DataConfig,
) -> None:
    with pytest.raises(ValueError, match=r"^5 processes can't share a step's 24 sequences") as told:
        share(config, 2, 0, 5)
    for part in ("batch_size 4", "accumulation 3", "data_shards 2", "that divides 24"):
        assert part in str(told.value)


def test_positions_of_other_shards_are_refused(config: DataConfig) -> None:
    one = share(config, 1)
    item = share(config, 2)
    with pytest.raises(ValueError, match=r"of streams \[0\], not of 1"):
        item.load_state_dict({0: item.state_dict()[0]})
    with pytest.raises(ValueError, match="world_size was 1 and is 2 now"):
        share(config, 2, 0, 2).load_state_dict(one.state_dict())


def test_data_of_no_use_are_found_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "validation.txt").write_text("enough text for a validation")
    (tmp_path / "train.txt").write_text("\n\n\n")
    config = DataConfig(source=str(tmp_path), tokenizer="bytes", sequence_length=16)
    with pytest.raises(ValueError, match="training document"):
        share(config, 1).prefetch()
