"""Which strategy a run has, and what the processes compare before they train."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_runs import summary

import lowrank.optimizers
from lowrank.trainers import strategies
from lowrank.trainers.agreement import check_partitions, check_same_data, check_shared
from lowrank.trainers.data import data_fingerprint
from lowrank.trainers.distributed import World
from lowrank.trainers.missing import MissingExtraError
from lowrank.trainers.pretrain import resolve

CPU = torch.device("cpu")
Run = Callable[[list[str]], tuple[int, str, str]]
Tiny = Callable[..., list[str]]


class Several(World):
    """The last process of some, which has heard of the others' values."""

    heard: list[Any]

    def gather(self, value: object) -> list[Any]:
        return [*self.heard, value]


def several(*heard: object) -> Several:
    world = Several(len(heard), len(heard) + 1, CPU)
    object.__setattr__(world, "heard", list(heard))
    return world


@pytest.mark.parametrize(
    ("asked", "size", "found"),
    [
        ("auto", 1, "alone"),
        ("fsdp2", 1, "alone"),
        ("auto", 2, "ddp"),
        ("ddp", 2, "ddp"),
        ("fsdp2", 2, "fsdp2"),
        ("deepspeed", 1, "alone"),
        ("deepspeed", 2, "deepspeed"),
    ],
)
def test_the_strategy_follows_the_number_of_processes(asked: str, size: int, found: str) -> None:
    config = resolve({"distributed": {"strategy": asked}})
    assert strategies.strategy_of(config, size) == found


@pytest.mark.parametrize("strategy", ["fsdp2", "deepspeed"])
def test_quantised_weights_are_not_sharded(strategy: str) -> None:
    name = "qgalore_adamw_8bit"
    settings = {"distributed": {"strategy": strategy}, "optimizer": {"name": name}}
    config = resolve(settings)
    assert strategies.strategy_of(config, 1) == "alone"
    said = f"distributed.strategy='{strategy}' with optimizer.name='{name}' and weights in 8 bits,"
    with pytest.raises(ValueError, match=said):
        strategies.strategy_of(config, 2)
    for name in ("relora_adamw", "loqt_adamw"):
        config = resolve({**settings, "optimizer": {"name": name}})
        assert strategies.strategy_of(config, 2) == strategy


def test_stage_3_is_not_compiled() -> None:
    for stage in (2, 3):
        section = {"strategy": "deepspeed", "zero_stage": stage}
        config = resolve({"distributed": section, "model": {"compile": True}})
        assert strategies.strategy_of(config, 1) == "alone"
        if stage == 2:
            assert strategies.strategy_of(config, 2) == "deepspeed"
    with pytest.raises(ValueError, match=r"model.compile is True with distributed.zero_stage=3"):
        strategies.strategy_of(config, 2)


def test_qgalore_with_dense_weights_is_sharded() -> None:
    optimizer = {"name": "qgalore_adamw_8bit", "weight_bits": None}
    config = resolve({"distributed": {"strategy": "fsdp2"}, "optimizer": optimizer})
    assert strategies.strategy_of(config, 2) == "fsdp2"


def test_low_rank_gradients_register_the_optimizers_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[Any, Any]] = []
    monkeypatch.setattr(
        lowrank.optimizers,
        "register_low_rank_hook",
        lambda model, optimizer: called.append((model, optimizer)),
        raising=False,
    )
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    strategies._exchange_low_rank(model, optimizer)
    assert called == [(model, optimizer)]
    monkeypatch.delattr(lowrank.optimizers, "register_low_rank_hook")
    with pytest.raises(ValueError, match=r"low_rank_gradients is True, .* accepted: false"):
        strategies._exchange_low_rank(model, optimizer)


def test_a_checkpoint_that_a_process_does_not_see_is_not_called_damaged(tmp_path: Path) -> None:
    check_shared(tmp_path, several(True, True))
    with pytest.raises(ValueError, match=r"^rank 1 doesn't see .*; --output must be on a file"):
        check_shared(tmp_path, several(True, False))


def test_other_data_or_another_tokenizer_are_named(corpus: Path) -> None:
    config = resolve({"data": {"source": str(corpus), "tokenizer": "bytes"}})
    tokenizer: Any = SimpleNamespace(fingerprint="own")
    data = data_fingerprint(config.data)
    same = {"data": data, "tokenizer": "own"}
    check_same_data(config, tokenizer, several(same))
    with pytest.raises(ValueError, match=r"^rank 1 and rank 0 have different tokenizer for"):
        check_same_data(config, tokenizer, several({**same, "tokenizer": "other"}))
    with pytest.raises(ValueError, match=r"^rank 1 and rank 0 have different data for"):
        check_same_data(config, tokenizer, several({**same, "data": {}}))


def test_a_missing_deepspeed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    settings = {"distributed": {"strategy": "deepspeed"}}
    with pytest.raises(MissingExtraError, match=r'pip install "lowrank-pretrain\[deepspeed\]"'):
        strategies.build_training(resolve(settings), World(0, 2, CPU))


def checkpoint(
    folder: Path, strategy: str, stage: int, processes: int, parts: dict[str, Any] | None = None
) -> Path:
    """A folder with what says how a checkpoint is divided; `parts` is in rank 0's state."""
    section = {"strategy": strategy, "zero_stage": stage}
    content = {"config": {"distributed": section}, "ranks": [{}] * processes}
    folder.mkdir()
    torch.save(content, folder / "trainer.pt")
    state = {"base_optimizer_state": parts or {}, "single_partition_of_fp32_groups": []}
    torch.save(state, folder / f"zero-00000-of-{processes:05d}.pt")
    return folder


def test_partitions_that_say_nothing_are_not_divided_anew(tmp_path: Path) -> None:
    """An earlier version has written them."""
    former = checkpoint(tmp_path / "former", "deepspeed", 2, 4)
    zero = checkpoint(tmp_path / "zero", "deepspeed", 2, 4, {"zero_partition": {"world": 4}})
    same = {"strategy": "deepspeed", "zero_stage": 2}
    check_partitions(former, resolve({"distributed": same}), 4)
    for settings, size, said in (
        (same, 3, "by 4 processes with .*zero_stage=2, .* and the run goes on with 3 processes w"),
        (same, 1, "by 4 processes with .*, and the run goes on with 1 process without DeepSpeed"),
        ({**same, "zero_stage": 3}, 4, "goes on with 4 processes with .*zero_stage=3; accepted: 4"),
        ({"strategy": "fsdp2"}, 4, "goes on with 4 processes without DeepSpeed; accepted: 4"),
    ):
        with pytest.raises(ValueError, match=f"{said}.*--set model.initial={former}$"):
            check_partitions(former, resolve({"distributed": settings}), size)
        check_partitions(zero, resolve({"distributed": settings}), size)


def test_deepspeed_goes_on_from_other_checkpoints(tmp_path: Path) -> None:
    zero = resolve({"distributed": {"strategy": "deepspeed"}})
    for number, strategy, processes in ((0, "fsdp2", 2), (1, "deepspeed", 1)):
        saved = checkpoint(tmp_path / str(number), strategy, 1, processes)
        for size in (1, 2):
            check_partitions(saved, zero, size)
        check_partitions(saved, resolve({"distributed": {"strategy": "ddp"}}), 3)


def test_one_process_says_that_there_is_nothing_to_share(
    tiny: Tiny, run: Run, tmp_path: Path
) -> None:
    plain, asked = tmp_path / "plain", tmp_path / "asked"
    _, output, _ = run(tiny(plain, 3))
    assert "one process" not in output
    _, output, _ = run(tiny(asked, 3, "distributed.strategy=fsdp2"))
    assert "one process, so distributed.strategy=fsdp2 does nothing" in output
    assert summary(asked)["weights_sha256"] == summary(plain)["weights_sha256"]
    assert summary(plain)["data_shards"] == 1
