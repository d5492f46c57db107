"""Parameters that `fully_shard` replaces after an optimizer was made from them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support import tiny_model
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lowrank.optimizers import GaLoreAdamW, LowRankOptimizer, build, param_groups

TOKENS = torch.arange(6)[None]


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("how", ["groups", "parameters", "build"])
def test_an_optimizer_made_before_fully_shard_raises(how: str) -> None:
    model = tiny_model()
    optimizer: LowRankOptimizer
    if how == "build":
        optimizer = build("galore_adamw", model, rank=4)
    elif how == "groups":
        optimizer = GaLoreAdamW(param_groups(model, rank=4))
    else:
        optimizer = GaLoreAdamW([{"params": list(model.parameters())[1:3], "rank": 4}])
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    model(TOKENS).sum().backward()
    with pytest.raises(ValueError, match=r"after fully_shard\(model\)"):
        optimizer.step()


@pytest.mark.usefixtures("alone")
def test_parameters_in_use_may_be_without_gradients() -> None:
    model = tiny_model()
    optimizer = GaLoreAdamW(param_groups(model, rank=4))
    optimizer.step()
    model(TOKENS).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
