"""`update_in_backward`: each parameter is updated in the backward pass."""

from __future__ import annotations

from typing import Literal

import torch
from torch import distributed

from .. import checks
from ..low_rank_gradients import examine
from ..optimizer import LowRankOptimizer
from ..warn import warn_user
from .handle import InBackward
from .norm import NORMS
from .passes import REFITS, ParamHook
from .refusals import check_refit, refuse_options, refuse_wrappers


def update_in_backward(
    optimizer: LowRankOptimizer,
    accumulation: int = 1,
    max_norm: float | None = None,
    norm: Literal["exact", "projected", "previous"] = "exact",
    refit: Literal["whole", "first"] = "whole",
) -> InBackward:
    """Updates each parameter in the backward pass, as soon as its gradient is there, and frees it.

    The loop stays `loss.backward(); optimizer.step(); optimizer.zero_grad()`, and so do the
    weights, up to rounding. Learning rates that the backward pass finds are those of the step. In
    place of `clip_grad_norm_`, which would find no gradients, `max_norm` clips; the smallest
    parameter's gradient waits for `step`, which raises if it was changed.

    With `accumulation`, the step has so many `backward()`; between them a projected matrix of m x n
    takes r x n numbers (fp32) where the method drops what is outside its subspace (GaLore,
    Q-GaLore, GaLore+, COAP, Muon in a subspace) and no refit is due in the step, or `refit` is
    "first". Gradients of all others are kept whole, as in a loop without this: `whole()` of the
    handle says which, and why.

    A `GradScaler` decides after `backward()` whether to take the step: it goes with the norms that
    are known only then, "exact" and "projected". DistributedDataParallel, DeepSpeed, and
    `capturable=True` are refused; `fully_shard` is accepted.

    Args:
        optimizer: of this package.
        accumulation: `backward()` calls of each step.
        max_norm: bound on the gradient's norm, None for none.
        norm: which norm. "exact" is the whole gradient's, as `clip_grad_norm_` has it: updates
            wait in projected form until it is known; with `accumulation` above 1 all gradients are
            kept whole. "projected" is that of the projected and the other whole gradients, all that
            updates use. "previous" is the norm of the last step, so that updates are made at
            once; the first step is not clipped. With `accumulation` it is measured as "projected".
        refit: what bases that are due are fitted to. "whole" is the step's gradient, as in a loop
            without this, which is kept whole until then. "first" is that of the step's first
            backward pass, so that only projections are kept of it, too. Each matrix whose
            projection is enough has its new bases then, also where the step is skipped later or
            dropped by `zero_grad`. Where a fit fails (a gradient of zeros), the gradient is kept
            whole, as by "whole". Nothing differs where a gradient is used at once.

    Returns:
        A handle: `remove()` turns it off, as the end of a `with` block does.

    Raises:
        TypeError: no optimizer of this package.
        ValueError: an option is out of range; or the optimizer is used in a way that does not go
            with it, or has a handle already.
    """
    if not isinstance(optimizer, LowRankOptimizer):
        raise TypeError(
            f"{type(optimizer).__name__}: accepted is an optimizer of lowrank.optimizers"
        )
    checks.integer("accumulation", accumulation, low=1)
    checks.choice("norm", norm, NORMS)
    checks.choice("refit", refit, REFITS)
    if max_norm is not None and max_norm != torch.inf:
        checks.number("max_norm", max_norm, low=0.0, low_open=True)
    if max_norm is None and norm != "exact":
        raise ValueError(f"norm={norm!r} without max_norm: accepted is max_norm, a positive number")
    check_refit(refit, max_norm, norm, accumulation)
    if optimizer._in_backward is not None:
        raise ValueError("update_in_backward is on for this optimizer: accepted is remove() first")
    refuse_options(optimizer)
    for group in optimizer.param_groups:
        for param in group["params"]:
            hooks = getattr(param, "_post_accumulate_grad_hooks", None) or {}
            if any(isinstance(h, ParamHook) and h.handle() is not None for h in hooks.values()):
                raise ValueError(
                    "update_in_backward of another optimizer has these parameters: accepted is "
                    "remove() of its handle first"
                )
    if distributed.is_available() and distributed.is_initialized():
        refuse_wrappers(optimizer, scaled=True)  # and in the first pass
    handle = InBackward(optimizer, int(accumulation), max_norm, norm, refit)
    if handle.whole_norm:
        warn_user(
            "norm='exact' with accumulation above 1 keeps all gradients whole; norm='projected' or "
            "'previous' doesn't (said once)"
        )
    optimizer._in_backward = handle
    # Or a GradScaler would take a step without gradients for one without overflow.
    optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]
    if refit == "first" and not any(isinstance(n, int) for n in examine(optimizer).values()):
        warn_user(
            f"refit='first' has no effect on {type(optimizer).__name__} with these options, which "
            "needs all gradients whole: handle.whole() has the reasons (said once)"
        )
    handle.attach()
    return handle
