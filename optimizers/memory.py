"""Bytes of optimizer state, measured."""

from __future__ import annotations

from torch import Tensor
from torch.optim import Optimizer

from .engine.sharding import local_part

#: Prefix of the state keys of bases, their scales and zero points.
BASIS_PREFIX = "basis"
MOMENT_PREFIXES = ("exp_avg", "momentum_buffer")


def _category(key: str) -> str:
    if key.startswith(BASIS_PREFIX):
        return "basis"
    return "moments" if key.startswith(MOMENT_PREFIXES) else "other"


def state_bytes_by_category(optimizer: Optimizer) -> dict[str, int]:
    """Bytes of `optimizer.state` as "moments", "basis" and "other" (step counts, ...).

    Every storage counts once and in full, even if a tensor is a slice of it.
    """
    totals = {"moments": 0, "basis": 0, "other": 0}
    seen: set[int] = set()
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, Tensor):
                storage = local_part(value).untyped_storage()
                if storage._cdata not in seen:
                    seen.add(storage._cdata)
                    totals[_category(key)] += storage.nbytes()
    return totals


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of every storage in `optimizer.state`, `step` included; nothing of the model."""
    return sum(state_bytes_by_category(optimizer).values())
