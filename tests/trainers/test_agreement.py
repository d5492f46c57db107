"""Processes that were started with other settings than rank 0, whose count for all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from lowrank.trainers import pretrain
from lowrank.trainers.agreement import check_same_request
from lowrank.trainers.distributed import World


class Second(World):
    """Rank 1 of two processes, whose rank 0 says something of its own."""

    def gather(self, value: Any) -> list[Any]:
        return [self.leading, value]

    leading: Any = None


def second(settings: dict[str, Any], resume: str | None = None) -> World:
    """Rank 1, where rank 0 was given other settings."""
    flat = {f"{part}.{key}": value for part, own in settings.items() for key, value in own.items()}
    return type("Rank1", (Second,), {"leading": {**flat, "--resume": resume}})(
        1, 2, torch.device("cpu")
    )


@pytest.mark.parametrize(
    ("own", "leading", "told"),
    [
        (
            {"optimizer": {"lr": 0.02}},
            {"optimizer": {"lr": 0.01}},
            "optimizer.lr is 0.02 on rank 1 and 0.01 on rank 0; start all processes with the same",
        ),
        ({}, {"train": {"clip": 0.5}}, "train.clip is not given on rank 1 and 0.5 on rank 0"),
        (
            {"data": {"source": "c4"}},
            {"data": {"source": "stdlib"}},
            "data.source is 'c4' on rank 1 and 'stdlib' on rank 0",
        ),
    ],
)
def test_another_setting_is_named(own: Any, leading: Any, told: str) -> None:
    with pytest.raises(ValueError, match="^" + told.replace(".", r"\.")):
        check_same_request(own, None, second(leading))


def test_another_way_to_begin_is_named() -> None:
    with pytest.raises(ValueError, match="--resume is not given on rank 1 and 'auto' on rank 0"):
        check_same_request({}, None, second({}, "auto"))


def test_what_may_differ() -> None:
    own = {"data": {"source": "/one/texts"}, "train": {"device": "cuda:1", "seed": 1}}
    leading = {"data": {"source": "/two/texts"}, "train": {"seed": 1}}
    check_same_request(own, None, second(leading))
    check_same_request({}, "runs/mine", second({}, "FOLDER"))
    check_same_request({"train": {"seed": 2}}, None, World(0, 1, torch.device("cpu")))


def test_a_run_asks_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def join(*_: Any, **__: Any) -> Iterator[World]:
        yield second({"train": {"steps": 5}})

    monkeypatch.setattr(pretrain, "join", join)
    request = pretrain.Request({"train": {"steps": 4}}, tmp_path / "run")
    with pytest.raises(ValueError, match=r"train\.steps is 4 on rank 1 and 5 on rank 0"):
        pretrain.pretrain(request, Console(quiet=True))
    assert not (tmp_path / "run").exists()
