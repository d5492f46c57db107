"""A step whose updates are made in its last backward pass, so that no gradient outlives it.

Whether the step is skipped is decided by the loss alone, before that pass. A gradient that is not
finite is passed over by the optimizer, parameter by parameter, or with clipping as a whole.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from math import inf
from typing import Any

import torch
from torch import nn

from lowrank.optimizers import InBackward, update_in_backward

from .config import TrainConfig
from .data import Batch
from .distributed import World
from .step import (
    Gradient,
    Phase,
    accumulator_device,
    check_packed,
    count,
    loss_factor,
    no_phase,
)

#: Why a step is skipped, with the offending value; None to take it.
Reason = tuple[str, float] | None


def begin(optimizer: Any, config: TrainConfig, passes: int) -> InBackward:
    """Turns updates in the backward pass on; the norm is measured even if nothing is clipped.

    Args:
        optimizer: of the run.
        config: its clipping.
        passes: backward passes of a step.

    Raises:
        ValueError: the optimizer doesn't go with it.
    """
    limit = config.clip or inf
    kind: Any = config.clip_norm if config.clip else "previous"
    with warnings.catch_warnings():  # the run's first line says how much is kept whole
        warnings.filterwarnings("ignore", message="norm='exact' with accumulation above 1")
        refit: Any = config.refit
        return update_in_backward(optimizer, passes, limit, kind, refit)


def take_step(
    module: nn.Module,
    batches: Sequence[Batch],
    world: World,
    optimizer: torch.optim.Optimizer,
    handle: InBackward,
    skip: Callable[[Gradient], Reason],
    *,
    as_one: bool,
    packed: bool = False,
    flag: bool = False,
    phase: Phase = no_phase,
    update: AbstractContextManager[Any] | None = None,
) -> tuple[Gradient, Reason, int]:
    """Takes a step by the gradient of the mean loss, as `compute_gradient` and `step` would.

    The host waits for the device before the last backward pass, to know the loss.

    Args:
        module: a `LanguageModel`, sharded or not.
        batches: this process's micro-batches.
        world: the processes.
        optimizer: trains the module's parameters.
        handle: of its updates.
        skip: decides by the loss, with a norm of 0, and once more by the norm, if `as_one`.
        as_one: whether the optimizer leaves out the whole step if the norm is not finite.
        packed: whether every process has equally many tokens.
        flag: this process's flag, summed in `Gradient.flags`.
        phase: a context for the passes, "forward" and "backward".
        update: a context for what is left to the optimizer's step.

    Returns:
        The loss and the norm (0 of a skipped step), why it was skipped, and the most bytes of
        gradients that outlived a backward pass.

    Raises:
        RuntimeError: `packed` is True, and processes have different numbers of tokens.
    """
    if handle.accumulation != len(batches):
        handle.accumulation = len(batches)
    own = sum(count(batch.targets) for batch in batches)
    device = accumulator_device(world)
    factor = loss_factor(own, world, packed)
    nats = torch.zeros((), dtype=torch.float64, device=device)
    kept = 0
    for index, batch in enumerate(batches):
        with phase("forward"):
            loss = module(batch.inputs.to(world.device), batch.targets.to(world.device))
        nats += loss.detach().to(device, torch.float64)
        if index == len(batches) - 1:
            told = torch.tensor([own, int(flag)], dtype=torch.float64).to(device)
            total, tokens, flags = world.sum(torch.cat([nats.unsqueeze(0), told])).tolist()
            check_packed(tokens, own, world, packed)
            gradient = Gradient(total / max(tokens, 1), 0.0, int(tokens), int(flags))
            reason = skip(gradient)
            if reason is not None:
                optimizer.zero_grad(set_to_none=True)
                return gradient, reason, kept
        with phase("backward"):
            (loss * factor.to(loss.dtype).to(loss.device)).backward()
        kept = max(kept, handle.kept_bytes)
    with update or nullcontext():
        optimizer.step()
    gradient = replace(gradient, norm=handle.norm or 0.0)
    return gradient, skip(gradient) if as_one else None, kept
