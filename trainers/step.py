"""One optimizer step: forward, backward, clipping, and the decision to skip."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .config import TrainConfig
from .data import Batch
from .distributed import World
from .loss import IGNORED


@dataclass(frozen=True)
class Gradient:
    """What the backward passes of one step came to, the same on every process.

    Attributes:
        loss: nats per token, over all micro-batches and processes.
        norm: global norm of the gradient before clipping.
        tokens: targets predicted, over all micro-batches and processes.
    """

    loss: float
    norm: float
    tokens: int


def compute_gradient(module: nn.Module, batches: Sequence[Batch], world: World) -> Gradient:
    """Leaves in ``.grad`` the gradient of the mean loss over all tokens of the step.

    The mean is over the tokens of all micro-batches and processes together, so it doesn't matter
    how they are split and how many of them are padding.

    Args:
        module: a `LanguageModel`, or one inside `DistributedDataParallel`.
        batches: this process's micro-batches.
        world: the processes.
    """
    tokens = world.sum_integer(sum(count(batch.targets) for batch in batches))
    # DistributedDataParallel takes the mean over processes; what is wanted is the sum.
    factor = world.size / max(tokens, 1)
    nats = torch.zeros((), dtype=torch.float64, device=_accumulator_device(world))
    for index, batch in enumerate(batches):
        last = index == len(batches) - 1
        with _synchronised(module, last):
            loss = module(batch.inputs.to(world.device), batch.targets.to(world.device))
            (loss * factor).backward()
        nats += loss.detach().to(nats.device, torch.float64)
    total = world.sum(nats)
    return Gradient(
        float(total) / max(tokens, 1), float(gradient_norm(module.parameters())), tokens
    )


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The Euclidean norm of all gradients together, in float32."""
    norms = [
        torch.linalg.vector_norm(item.grad, dtype=torch.float32)
        for item in parameters
        if item.grad is not None
    ]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())


def clip(parameters: Iterable[nn.Parameter], norm: float, limit: float) -> None:
    """Scales the gradients, whose norm is `norm`, down to `limit` at most; 0 leaves them."""
    if limit > 0 and norm > limit:
        for item in parameters:
            if item.grad is not None:
                item.grad.mul_(limit / norm)


def reason_to_skip(
    gradient: Gradient, mean_loss: float | None, config: TrainConfig
) -> tuple[str, float] | None:
    """Why a step must not be taken, and the value that says so; None if it may.

    Args:
        gradient: of the step.
        mean_loss: running mean of the former losses, None while there are too few.
        config: holds how many nats above the mean are a spike.
    """
    if not math.isfinite(gradient.loss):
        return "nan_loss", gradient.loss
    if not math.isfinite(gradient.norm):
        return "nan_gradient", gradient.norm
    if config.spike > 0 and mean_loss is not None and gradient.loss > mean_loss + config.spike:
        return "spike", gradient.loss
    return None


def count(targets: Tensor) -> int:
    """How many targets are predicted."""
    return int((targets != IGNORED).sum())


def _synchronised(module: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
    if isinstance(module, DistributedDataParallel) and not last:
        return module.no_sync()
    return contextlib.nullcontext()


def _accumulator_device(world: World) -> torch.device:
    # MPS has no float64
    return torch.device("cpu") if world.device.type == "mps" else world.device
