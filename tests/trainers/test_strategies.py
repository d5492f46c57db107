"""Which strategy a run has, and what the processes compare before they train."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_runs import summary

import lowrank.optimizers
from lowrank.trainers import strategies
from lowrank.trainers.agreement import check_same_data, check_shared
from lowrank.trainers.data import data_fingerprint
from lowrank.trainers.distributed import World
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
    ],
)
def test_the_strategy_follows_the_number_of_processes(asked: str, size: int, found: str) -> None:
    config = resolve({"distributed": {"strategy": asked}})
    assert strategies.strategy_of(config, size) == found


@pytest.mark.parametrize("name", ["relora_adamw", "qgalore_adamw_8bit", "sltrain_adamw"])
def test_methods_that_change_layers_are_not_sharded(name: str) -> None:
    settings = {"distributed": {"strategy": "fsdp2"}, "optimizer": {"name": name}}
    config = resolve(settings)
    assert strategies.strategy_of(config, 1) == "alone"
    with pytest.raises(ValueError, match=f"optimizer.name='{name}', which changes the model's"):
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


def test_deepspeed_is_refused_by_name(tiny: Tiny, run: Run, tmp_path: Path) -> None:
    arguments = tiny(tmp_path / "run", 2, "distributed.strategy=deepspeed")
    status, _, errors = run(arguments)
    assert status == 2
    assert errors.startswith("lowrank: distributed.strategy='deepspeed' is not supported yet")
    assert not (tmp_path / "run").exists()


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
