"""DeepSpeed's ZeRO: `convert`, `build`, `deepspeed.initialize` follows one process, with events."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from sharded import train
from sharded import whole as plain
from test_fsdp2_layers import Case, built, converted
from test_zero import engine_of, go_on, whole
from torch import Tensor, nn

from lowrank.optimizers import merge

pytest.importorskip("deepspeed")
pytestmark = pytest.mark.slow


def dense(model: nn.Module, case: Case) -> dict[str, Tensor]:
    """All weights of the merged model, gathered where stage 3 has cut them."""
    twin = converted(case)
    twin.load_state_dict({**model.state_dict(), **whole(model)})
    return plain(merge(twin))


def follow(
    rank: int, world: int, folder: Path, cases: list[Case], stages: list[list[int]], steps: int
) -> list[dict[Any, Any]]:
    """Weights and events of each case by stage; the last process trains alone as well."""
    warnings.simplefilter("ignore")
    made = []
    for case, own in zip(cases, stages, strict=True):
        found: dict[Any, Any] = {}
        for stage in own:
            model = converted(case)
            engine = engine_of(model, built(case, model), stage, world)
            go_on(engine, range(steps), rank, world)
            found[stage] = dense(model, case)
        # LoQT averages its gradients over all processes where parameters are plain.
        if rank == world - 1 or case[0] == "loqt_adamw":
            model = converted(case)
            optimizer = built(case, model)
            found["events"] = []
            optimizer.register_event_hook(found["events"].append)
            train(model, optimizer, range(steps))
            found["alone"] = plain(merge(model))
        made.append(found)
    return made
