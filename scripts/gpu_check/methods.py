"""The methods whose steps are timed, and what each of them has to do at least."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim import Optimizer

from lowrank import optimizers

from .section import Rates
from .workload import Matrices, Model, made

NEVER = 1_000_000_000
_LEARNING_RATE = 1e-6
#: Bases of steps that are timed without refreshes need not be singular vectors.
_FIT = {"refresh": "randomized", "rotate": False}

Flops = Callable[[int, int, int], float]


@dataclass(frozen=True)
class Work:
    """What a step has to do for a projected m x n matrix, short side first, beside its state.

    Attributes:
        flops: of its matrix products, of (m, n, r).
        reads: how often the gradient is read.
        plain_reads: the same of embedding, head and norms.
        low: how often an r x n matrix in bf16 is written or read.
    """

    flops: Flops = lambda m, n, r: 0.0
    reads: int = 1
    plain_reads: int = 1
    low: int = 0


def _galore(m: int, n: int, r: int) -> float:
    return 4.0 * m * n * r


def _apollo(m: int, n: int, r: int) -> float:
    return 2.0 * m * n * r


def _online(m: int, n: int, r: int) -> float:
    return 6.0 * m * n * r


def _muon(m: int, n: int, r: int) -> float:
    return 5.0 * (4.0 * m * m * n + 2.0 * m**3)


#: The projected gradient and the update in the subspace are each written and read.
GALORE = Work(_galore, low=4)


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        label: for people.
        name: as `build` knows it; None is torch's fused AdamW.
        work: see `Work`.
        options: of `build`.
        weight_bytes: of an entry of a projected weight.
        capturable: whether steps are captured, too.
    """

    label: str
    name: str | None
    work: Work = GALORE
    options: dict[str, Any] = field(default_factory=dict)
    weight_bytes: float = 2.0
    capturable: bool = False

    def keywords(self, rank: int) -> dict[str, Any]:
        """What `build` is given beside the model."""
        return {"rank": rank, "update_proj_gap": NEVER, **self.options}

    def make(self, matrices: Matrices, rank: int, **more: Any) -> Optimizer:
        """An optimizer of these matrices that never refreshes."""
        if self.name is None:
            params = list(matrices.parameters())
            return torch.optim.AdamW(params, lr=_LEARNING_RATE, fused=True, **more)
        options = self.keywords(rank) | more
        return optimizers.build(self.name, matrices, lr=_LEARNING_RATE, **options)

    def state_bytes(self, model: Model) -> int:
        """Bytes of the optimizer's state, by formula."""
        if self.name is None:
            return 4 * model.parameters()
        options = self.keywords(model.rank)
        return optimizers.expected_state_bytes(self.name, made(model, "meta"), **options)

    def floor(self, model: Model, state: dict[str, int], rates: Rates) -> float:
        """Milliseconds of the products and of the bytes that have to be moved, one by one.

        Args:
            model: the matrices.
            state: bytes of moments and bases, as `state_bytes_by_category` gives them; moments are
                read and written, bases are read twice (or, learning online, written as well).
            rates: of the device.
        """
        flops = moved = 0.0
        for shape, count in model.shapes().items():
            m, n = sorted(shape)
            r = min(self.keywords(model.rank)["rank"], m)
            flops += count * self.work.flops(m, n, r)
            moved += count * m * n * (2.0 * self.work.reads + 2.0 * self.weight_bytes)
            moved += count * 2.0 * n * r * self.work.low
        plain = model.parameters() - sum(m * n for m, n in model.projected())
        moved += plain * (2.0 * self.work.plain_reads + 4.0)
        moved += 2.0 * (state["moments"] + state["basis"])
        return flops / rates.bf16 + moved / rates.copy


_FUSED = Method("torch AdamW, fused", None, Work(), capturable=True)

#: What is timed first.
CORE = (
    _FUSED,
    Method("galore_adamw", "galore_adamw", options=_FIT, capturable=True),
    Method("galore_adamw_8bit", "galore_adamw_8bit", options=_FIT, capturable=True),
    Method("fira_adamw", "fira_adamw", Work(_galore, 2, low=4), _FIT, capturable=True),
    Method(
        "qgalore_adamw_8bit, INT8 weights",
        "qgalore_adamw_8bit",
        options=_FIT,
        weight_bytes=1.0 + 4 / 256,
    ),
)

OTHERS = (
    Method("apollo_adamw", "apollo_adamw", Work(_apollo, 2, low=2)),
    Method("coap_adamw", "coap_adamw"),
    Method("online_subspace_adamw", "online_subspace_adamw", Work(_online, 2, low=4)),
    Method("frugal_adamw", "frugal_adamw", Work(), {"moments": "keep"}, capturable=True),
    Method("adamw", "adamw", Work(), capturable=True),
    Method("adamw_8bit", "adamw_8bit", Work(), capturable=True),
    Method("muon", "muon", Work(_muon)),
    Method("adafactor", "adafactor", Work(reads=2, plain_reads=2)),
    Method("apollo_mini_adamw", "apollo_mini_adamw", Work(_apollo, 2), {"rank": 1}),
    Method(
        "galore_adamw, stochastic rounding",
        "galore_adamw",
        options=_FIT | {"stochastic_rounding": True},
    ),
    Method("galore_adafactor", "galore_adafactor", Work(_galore, plain_reads=2, low=4), _FIT),
)
