"""Factored layers stay equal on two processes through merges, switches and draws."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_distributed import torchrun

from lowrank.optimizers import build
from lowrank.trainers.config import ModelConfig
from lowrank.trainers.data import Batch
from lowrank.trainers.distributed import World, join
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


def test_ranks_agree_to_the_bit_at_each_step(tmp_path: Path) -> None:
    result = torchrun(__file__, tmp_path / "hashes.pt")
    assert result.returncode == 0, result.stderr
    found = torch.load(tmp_path / "hashes.pt", weights_only=True)
    assert found.keys() == METHODS.keys()
    for name, ranks in found.items():
        assert len(ranks) == 2
        assert ranks[0] == ranks[1], name
        assert len(set(ranks[0])) == 5, name


if __name__ == "__main__":
    with join("cpu") as joined:
        outcome = {name: joined.gather(train(name, joined)) for name in METHODS}
        if joined.leads:
            torch.save(outcome, sys.argv[1])
