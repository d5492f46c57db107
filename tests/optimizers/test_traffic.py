"""What a sharded step sends: as many bytes as the formula says, and no m x n matrix."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from fsdp2_runs import NAMES, Case, options_of
from representative import with_representative
from sharded import Recorder, block, run, shard, tokens
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional

from lowrank.optimizers import build, expected_step_traffic

CASES: list[Case] = [
    *((name, {}) for name in NAMES),
    ("galore_adamw", {"proj_type": "full"}),
    ("galore_adamw", {"proj_type": "left", "skip_nonfinite": False}),
    ("fira_adamw", {"limiter": None}),
    ("apollo_adamw", {"scale_type": "tensor"}),
    ("adafactor", {"scale_parameter": True, "beta1": 0.9}),
]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> Recorder:
    recorder = Recorder()
    rows = tokens(number, 0)
    logits = model(rows[:, :-1])
    functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).backward()
    with recorder.recording():
        optimizer.step()
    optimizer.zero_grad()
    return recorder


def record(rank: int, world: int, folder: Path, cases: list[Case]) -> list[tuple[int, int, int]]:
    """For each case bytes of a step, the largest tensor of it, and that of a refresh."""
    warnings.simplefilter("ignore")
    mesh = DeviceMesh("cpu", torch.arange(world))
    made = []
    for name, options in cases:
        model = shard(block(), mesh)
        keywords = {**options_of((name, options)), "update_proj_gap": 40}
        optimizer = build(name, model, **keywords)
        first, second = (step(model, optimizer, number) for number in range(2))
        sent = sum(size for _, _, size in second.calls)
        largest = [max((n for _, n, _ in r.calls), default=0) for r in (second, first)]
        made.append((sent, *largest))
    return made


def formula(case: Case, world: int) -> int:
    options: dict[str, Any] = {**options_of(case), "update_proj_gap": 40}
    options.pop("lr")
    return expected_step_traffic(case[0], block(), world, **options)


@pytest.mark.parametrize("world", with_representative((2, 4), (2,)))
def test_bytes_of_a_step_are_the_formulas(world: int, tmp_path: Path) -> None:
    made = run(record, world, tmp_path, CASES)
    differ = {
        f"{case}": (result[0], formula(case, world))
        for case, result in zip(CASES, made[0], strict=True)
        if result[0] != formula(case, world)
    }
    assert not differ
    assert all(other == made[0] for other in made)


class Wide(nn.Module):
    """Matrices that are large beside their rank."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Linear(96, 160, bias=False)
        self.mlp = nn.Linear(160, 96, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(torch.tanh(self.attn(x)))


def large(rank: int, world: int, folder: Path, names: list[str]) -> dict[str, int]:
    """The largest tensor sent in any of five steps, refreshes included."""
    warnings.simplefilter("ignore")
    found = {}
    for name in names:
        torch.manual_seed(0)
        model = shard(Wide(), DeviceMesh("cpu", torch.arange(world)))
        optimizer = build(name, model, **{**options_of((name, {})), "update_proj_gap": 2})
        entries = 0
        for number in range(5):
            torch.manual_seed(number)
            x = torch.randn(32, 96)
            (model(x) - x.roll(1)).square().mean().backward()
            recorder = Recorder()
            with recorder.recording():
                optimizer.step()
            optimizer.zero_grad()
            entries = max(entries, *(n for _, n, _ in recorder.calls))
        found[name] = entries
    return found


@pytest.mark.slow
def test_no_matrix_travels_whole(tmp_path: Path) -> None:
    """In refreshes at most n x (r + 16), or a Gram matrix of the short side."""
    projecting = [n for n in NAMES if n not in ("adamw", "adamw_8bit", "adafactor", "muon")]
    for name, entries in run(large, 2, tmp_path, projecting)[0].items():
        assert entries <= max(96 * 96, 160 * (4 + 16)) < 96 * 160, name
