"""How long the host takes for a step of LLaMA-60M's matrices, without one: nothing is computed.

Matrices are so small that their products take no time, as many and of as many shapes as the model
has, and take on the CPU the way that steps take on a GPU. What is left is Python, and what torch
takes to start an operation: two products a matrix, and a few for each shape. Starting a kernel of a
GPU takes longer than one of a CPU; so this is the lesser part of what a step takes at least.
"""

from __future__ import annotations

import gc
import time

import torch
from torch import nn

from lowrank.optimizers import build
from lowrank.optimizers.engine.devices import as_on_gpu

#: Of one block: a square matrix, a wide one and a tall one stand for those of the model.
BLOCK = (*[(16, 16)] * 4, *[(24, 16)] * 2, (16, 24))
BLOCKS = 8


def host_seconds(method: str, steps: int = 300) -> float:
    """The least processor time of a step between refreshes, on one core.

    Args:
        method: a name that `build` accepts.
        steps: how many are taken.
    """
    model = nn.ModuleDict(
        {
            f"mlp_{block}_{place}": nn.Linear(n, m, bias=False)
            for block in range(BLOCKS)
            for place, (m, n) in enumerate(BLOCK)
        }
    )
    taken = []
    with as_on_gpu():
        optimizer = build(method, model, lr=1e-3, rank=4, update_proj_gap=10 * steps)
        for param in model.parameters():
            param.grad = torch.randn_like(param)
        gc.collect()
        gc.disable()
        try:
            for _ in range(steps):
                start = time.process_time_ns()
                optimizer.step()
                taken.append(time.process_time_ns() - start)
        finally:
            gc.enable()
    return min(taken) * 1e-9
