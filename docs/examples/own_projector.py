"""A projector of your own, and a method that uses it.

python docs/examples/own_projector.py
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from tiny import batch, language_model

from lowrank.optimizers import LowRankOptimizer, build, expected_state_bytes, state_bytes
from lowrank.optimizers.engine.geometry import Side
from lowrank.optimizers.engine.method import method
from lowrank.optimizers.engine.rule_families import ADAMW
from lowrank.optimizers.engine.strategies import register_projector
from lowrank.optimizers.projectors import Projector


@register_projector("largest_columns")
@dataclass(frozen=True)
class LargestColumns(Projector):
    """The span of the gradient's r largest columns (rows, for a right projection)."""

    ONE_AXIS: ClassVar[str] = "largest_columns"  # can't project both axes
    SPREADS: ClassVar[bool] = False  # reads whole gradients: refused where rows are spread (FSDP2)

    def fit(self, params):
        """Stores a basis of d x r for each matrix; None keeps the former one."""
        fitted = []
        for param in params:
            gradient = param.grad.float()
            if not gradient.isfinite().all() or not gradient.any():
                fitted.append(None)
                continue
            axis = gradient if param.geometry.side is Side.LEFT else gradient.T
            largest = axis.norm(dim=0).topk(param.geometry.rank).indices
            bases = (torch.linalg.qr(axis[:, largest]).Q,)
            self.store(param, bases)
            fitted.append(bases)
        return fitted


@method(
    "columns_adamw", summary="Adam on the largest columns, Fira's residual", state="m r + 2 n r"
)
class ColumnsAdamW(LowRankOptimizer):
    """Adam in the span of the largest columns, and the residual scaled as Fira does."""

    rule = ADAMW
    projection_defaults: ClassVar = {"projector": "largest_columns", "residual": "norm_scaled"}


model = language_model()
optimizer = build("columns_adamw", model, lr=0.01, rank=16, update_proj_gap=20, basis="int8")
losses = []
for step in range(60):
    loss = model(**batch(step)).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert state_bytes(optimizer) == expected_state_bytes("columns_adamw", model, rank=16, basis="int8")
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
