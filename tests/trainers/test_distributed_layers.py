"""Factored layers stay equal on two processes through merges, switches and draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from forked import run
from processes import PRELOAD as PRELOAD

from lowrank.optimizers import build
from lowrank.trainers.config import ModelConfig
from lowrank.trainers.data import Batch
from lowrank.trainers.distributed import World
from lowrank.trainers.models import build_model
from lowrank.trainers.step import compute_gradient
from lowrank.trainers.strategies import replicate
from lowrank.trainers.weights import weights_sha256

pytestmark = pytest.mark.slow
METHODS: dict[str, dict[str, Any]] = {
    "loqt_adamw": {"update_proj_gap": 2},
    "relora_adamw": {"update_proj_gap": 2},
    "sltrain_adamw": {"refactor_gap": 2, "density": 0.1},
    "sst_adamw": {"update_proj_gap": 2},
    "switchlora_adamw": {"switch_interval": 10.0, "descent_rate": 10.0},
}


def train(name: str, world: World) -> list[str]:
    """Five steps, each process on its own tokens and after random draws of its own."""
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = ModelConfig(**shape, num_attention_heads=2, vocab_size=31)
    model = build_model(config, 8, 0, world.device)
    optimizer = build(name, model.network, lr=1e-2, rank=4, **METHODS[name])
    module = replicate(model, world)
    torch.manual_seed(world.rank)
    hashes = []
    for _ in range(5):
        tokens = torch.randint(31, (2, 9))
        compute_gradient(module, [Batch(tokens[:, :-1], tokens[:, 1:])], world)
        optimizer.step()
        optimizer.zero_grad()
        hashes.append(weights_sha256(model))
    return hashes


def hashes(rank: int, size: int, folder: Path) -> dict[str, list[str]]:
    world = World(rank, size, torch.device("cpu"))
    return {name: train(name, world) for name in METHODS}


def test_ranks_agree_to_the_bit_at_each_step(tmp_path: Path) -> None:
    first, second = run(hashes, 2, tmp_path)
    assert first == second
    for name in METHODS:
        assert len(set(first[name])) == 5, name
