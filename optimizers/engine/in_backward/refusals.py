"""What `update_in_backward` can't be combined with, and where in a backward pass a hook runs."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn
from torch.autograd.function import BackwardCFunction

from ..parameters import label, names
from ..sharding import is_dtensor
from ..warn import warn_user
from ..zero import partitioned

if TYPE_CHECKING:
    from ..optimizer import LowRankOptimizer

_BEFORE = "whose gradients are averaged only after they were applied"
_SCALER = (
    "GradScaler with update_in_backward, whose updates would be made from gradients that are not "
    "unscaled yet: accepted are max_norm (inf clips nothing) with norm='exact' or 'projected', "
    "which wait for the scaler, bfloat16 autocast without one, or GradScaler(enabled=False)"
)
_APPLY = BackwardCFunction.apply.__code__
_RUN = torch.autograd.graph._engine_run_backward.__code__


def check_refit(refit: str, max_norm: float | None, norm: str, accumulation: int) -> None:
    """Raises `ValueError` where bases of the first gradient would free none."""
    if refit == "first" and max_norm is not None and norm == "exact" and accumulation > 1:
        raise ValueError(
            "refit='first' with norm='exact' and accumulation above 1, which keeps all gradients "
            "whole: accepted is norm='projected' or 'previous'"
        )


def refuse_options(optimizer: LowRankOptimizer) -> None:
    """Raises `ValueError` for what the optimizer itself tells; cheap."""
    if any(group["capturable"] for group in optimizer.param_groups):
        raise ValueError(
            "capturable=True with update_in_backward: accepted is False; what is kept of a "
            "gradient depends on the step count, which is then on the device"
        )
    if optimizer._shared is not None:
        raise ValueError(
            "update_in_backward after share_refreshes() or register_low_rank_hook(), which are for "
            f"DistributedDataParallel, {_BEFORE}: accepted is fully_shard(model)"
        )
    for plan in optimizer._plans.values():
        for param, name in zip(plan.params, plan.names, strict=True):
            if partitioned(param) or hasattr(param, "ds_id"):
                raise ValueError(
                    f"update_in_backward with {label(name, param)} in DeepSpeed's ZeRO, which "
                    "has gradients and clipping of its own: accepted is fully_shard(model)"
                )
    seen: set[int] = set()
    for group in optimizer.param_groups:
        for param, name in zip(group["params"], names(group), strict=True):
            if id(param) in seen:
                raise ValueError(
                    f"update_in_backward with {label(name, param)} twice in the groups: accepted "
                    "is once"
                )
            seen.add(id(param))


def refuse_wrappers(optimizer: LowRankOptimizer, *, scaled: bool = False) -> None:
    """Raises `ValueError` if the parameters are in a wrapper that averages gradients later.

    And if a `GradScaler` is in use, unless gradients may be `scaled`. Looks at all objects of the
    process, so it is called once.
    """
    own = {id(param) for group in optimizer.param_groups for param in group["params"]}
    for found in _wrappers():
        if isinstance(found, torch.amp.GradScaler):
            if not scaled and found._enabled and found._scale is not None:
                raise ValueError(f"{_SCALER} (also of a scaler that another model's loss uses)")
        elif any(id(param) in own for param in found.parameters()):
            raise ValueError(
                f"update_in_backward with {type(found).__name__}, {_BEFORE}: accepted is "
                "fully_shard(model), or one process"
            )
    if distributed.is_available() and distributed.is_initialized():
        _warn_of_copies(optimizer)


def _wrappers() -> list[Any]:
    """All scalers, and all models of DDP and DeepSpeed."""
    wanted: list[Any] = [torch.amp.GradScaler, nn.parallel.DistributedDataParallel]
    wanted.append(getattr(sys.modules.get("deepspeed"), "DeepSpeedEngine", None))
    known: dict[type, bool] = {}
    found = []
    for made in gc.get_objects():
        kind = type(made)  # `isinstance` would ask proxies, which may import or compute something
        match = known.get(kind)
        if match is None:
            match = known[kind] = any(base in wanted for base in kind.__mro__)
        if match:
            found.append(made)
    return found


def _warn_of_copies(optimizer: LowRankOptimizer) -> None:
    params: Sequence[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
    if distributed.get_world_size() > 1 and not any(map(is_dtensor, params)):
        warn_user(
            f"update_in_backward on {distributed.get_world_size()} processes with parameters that "
            "are not sharded: each applies its own gradients, averaging them after backward() "
            "comes too late (said once)"
        )


def refuse_scaler() -> None:
    """Raises `ValueError` in a step that a `GradScaler` takes after updates were made."""
    raise ValueError(f"{_SCALER} (and start again: this step's updates are made)")


def nested() -> bool:
    """Whether the calling hook runs in a backward pass inside of another one's function.

    So it does in segments that are checkpointed with `use_reentrant=True`.
    """
    frame: FrameType | None = sys._getframe()
    inside = False
    while frame is not None:
        if frame.f_code is _RUN:
            inside = True
        elif inside and frame.f_code is _APPLY:
            return True
        frame = frame.f_back
    return False
