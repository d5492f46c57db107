"""Six steps of methods that have compiled kernels, on layers that need all kinds of them.

For the tests on the host's library and on a GPU, and for `./scripts/gpu-check`.
"""

from __future__ import annotations

from typing import Any

import torch
from support import matrix
from torch import nn

from lowrank.cuda import using_kernels
from lowrank.optimizers import Int8Weight, build


class Layers(nn.Module):
    """Two projected matrices of both orientations, and a plain one."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.mlp_up = nn.Linear(96, 160, bias=False, dtype=dtype)
        self.mlp_down = nn.Linear(160, 96, bias=False, dtype=dtype)
        self.head = nn.Linear(96, 64, bias=False, dtype=dtype)
        for index, weight in enumerate(self.parameters()):
            weight.data.copy_(matrix(*weight.shape, index) * 0.05)


def trained(
    name: str, dtype: torch.dtype, chosen: str, *, device: str = "cpu", **options: Any
) -> list[torch.Tensor]:
    """Weights after six steps with the given kernels."""
    model = Layers(dtype).to(device)
    with using_kernels(chosen):
        optimizer = build(name, model, lr=1e-2, rank=8, update_proj_gap=3, **options)
        for step in range(6):
            for index, weight in enumerate(model.parameters()):
                weight.grad = matrix(*weight.shape, 10 * step + index).to(device, weight.dtype)
            optimizer.step()
        return [
            (w.dequantize() if isinstance(w, Int8Weight) else w.detach()).float().cpu()
            for w in model.parameters()
        ]


METHODS = (
    ("galore_adamw", torch.float32, {}),
    ("galore_adamw", torch.bfloat16, {"weight_decay": 0.1}),
    ("galore_adamw", torch.bfloat16, {"stochastic_rounding": True}),
    ("galore_adamw_8bit", torch.float32, {}),
    ("galore_adamw_8bit", torch.bfloat16, {}),
    ("qgalore_adamw_8bit", torch.bfloat16, {}),
    ("fira_adamw", torch.float32, {"weight_decay": 0.1}),
    ("fira_adamw", torch.bfloat16, {}),
    ("fira_adamw", torch.bfloat16, {"stochastic_rounding": True}),
    ("apollo_adamw", torch.float32, {}),
)
