"""Learning-rate schedules: pure functions from a step to a multiplier of the peak.

``step`` counts the optimizer steps already taken: 0 for the first. With w warmup steps the
multiplier rises as (step + 1) / (w + 1), so that no step has a zero rate, is 1 at step w, and
reaches `min_ratio` when all `total` steps have been taken.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from .config import RunConfig, ScheduleConfig, warmup_steps

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LambdaLR


def warmup(step: int, warmup_steps: int) -> float:
    """The linear rise: (step + 1) / (warmup_steps + 1), and 1 from step `warmup_steps` on."""
    return min(1.0, (step + 1) / (warmup_steps + 1))


def constant(step: int, warmup_steps: int) -> float:
    """Warmup, then 1."""
    return warmup(step, warmup_steps)


def linear(step: int, total: int, warmup_steps: int, min_ratio: float) -> float:
    """Warmup, then a straight line to `min_ratio` at step `total`."""
    if step < warmup_steps:
        return warmup(step, warmup_steps)
    return 1.0 - (1.0 - min_ratio) * _share(step, warmup_steps, total)


def cosine(step: int, total: int, warmup_steps: int, min_ratio: float) -> float:
    """Warmup, then half a cosine to `min_ratio` at step `total`."""
    if step < warmup_steps:
        return warmup(step, warmup_steps)
    share = _share(step, warmup_steps, total)
    return min_ratio + (1.0 - min_ratio) * 0.5 * (1.0 + math.cos(math.pi * share))


def cosine_restarts(
    step: int, total: int, warmup_steps: int, min_ratio: float, cycle: int, restart_warmup: int
) -> float:
    """`cosine`, and a short linear rise back to it after each multiple of `cycle` steps.

    ReLoRA's "jagged" schedule (arXiv 2307.05695): the envelope is one cosine over the whole run.
    In the s-th step of a cycle, s < w, the multiplier is (s + 1) / (w + 1) of the envelope at the
    rise's end, w being `restart_warmup`; the released code has s / w, so its first does nothing.
    The first cycle has the run's own warmup only.
    """
    since = step % cycle
    if step < cycle or since >= restart_warmup:
        return cosine(step, total, warmup_steps, min_ratio)
    end = step - since + restart_warmup
    return warmup(since, restart_warmup) * cosine(end, total, warmup_steps, min_ratio)


def wsd(step: int, total: int, warmup_steps: int, decay_steps: int, min_ratio: float) -> float:
    """Warmup, 1, then a straight line over `decay_steps` to `min_ratio` at step `total`."""
    start = max(warmup_steps, total - decay_steps)
    if step < start:
        return warmup(step, warmup_steps)
    return 1.0 - (1.0 - min_ratio) * _share(step, start, total)


def multiplier(config: ScheduleConfig, step: int, total: int, warmup_steps: int) -> float:
    """The multiplier of the peak learning rate for the step after `step` steps.

    Args:
        config: names the schedule and its ratios.
        step: optimizer steps already taken, 0 for the first.
        total: steps of the whole run.
        warmup_steps: steps of the rise.
    """
    if config.name == "cosine":
        return cosine(step, total, warmup_steps, config.min_ratio)
    if config.name == "cosine_restarts":
        return cosine_restarts(
            step, total, warmup_steps, config.min_ratio, config.cycle, config.restart_warmup
        )
    if config.name == "linear":
        return linear(step, total, warmup_steps, config.min_ratio)
    if config.name == "wsd":
        decay_steps = math.floor(config.decay_ratio * total + 0.5)
        return wsd(step, total, warmup_steps, decay_steps, config.min_ratio)
    return constant(step, warmup_steps)


def run_multiplier(config: RunConfig, step: int) -> float:
    """`multiplier` with the length and the warmup of a run."""
    return multiplier(config.schedule, step, config.train.steps, warmup_steps(config))


def lambda_lr(
    optimizer: Optimizer, config: ScheduleConfig, total: int, warmup_steps: int
) -> LambdaLR:
    """The same schedule as a `torch.optim.lr_scheduler.LambdaLR`, for other training loops.

    Call its ``step()`` once after every optimizer step.
    """
    from torch.optim.lr_scheduler import LambdaLR

    return LambdaLR(optimizer, lambda step: multiplier(config, step, total, warmup_steps))


def _share(step: int, start: int, end: int) -> float:
    if end <= start:
        return 1.0
    return min(1.0, (step - start) / (end - start))
