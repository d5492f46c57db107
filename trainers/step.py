"""One optimizer step: forward, backward, clipping, and the decision to skip."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lowrank.optimizers.engine.in_backward.norm import norm_of

from .config import TrainConfig
from .data import Batch
from .distributed import World
from .loss import IGNORED
from .sharding import is_sharded, local
from .zero_engine import ZeroEngine

#: A context for a part of a step, by its name.
Phase = Callable[[str], contextlib.AbstractContextManager[Any]]


def no_phase(name: str) -> contextlib.AbstractContextManager[Any]:
    """Nothing is done around a part of a step."""
    return contextlib.nullcontext()


@dataclass(frozen=True)
class Gradient:
    """The result of a step's backward passes, the same on every process.

    Attributes:
        loss: nats per token, over all micro-batches and processes.
        norm: global norm of the gradient before clipping.
        tokens: targets predicted, over all micro-batches and processes.
        flags: how many processes raised their flag.
    """

    loss: float
    norm: float
    tokens: int
    flags: int = 0


def compute_gradient(
    module: nn.Module,
    batches: Sequence[Batch],
    world: World,
    *,
    packed: bool = False,
    flag: bool = False,
    engine: ZeroEngine | None = None,
    phase: Phase = no_phase,
) -> Gradient:
    """Leaves in ``.grad`` the gradient of the mean loss over all tokens of the step.

    The mean is over the tokens of all micro-batches and processes together, so it doesn't matter
    how they are split and how many of them are padding. Besides the gradient, processes
    exchange one vector after the backward passes; with padding, also the number of tokens before
    them, without synchronising a GPU.

    Args:
        module: a `LanguageModel`, sharded or not, or one inside `DistributedDataParallel` or
            DeepSpeed's engine.
        batches: this process's micro-batches.
        world: the processes.
        packed: whether there is no padding, so that every process has equally many tokens.
        flag: this process's flag, summed in `Gradient.flags`.
        engine: keeps the gradient in a place of its own; the norm is then 0 here, and known after
            its step.
        phase: a context for the passes, "forward" and "backward".

    Raises:
        RuntimeError: `packed` is True, and processes have different numbers of tokens.
    """
    own = sum(count(batch.targets) for batch in batches)
    device = accumulator_device(world)
    factor = loss_factor(own, world, packed)
    nats = torch.zeros((), dtype=torch.float64, device=device)
    for index, batch in enumerate(batches):
        last = index == len(batches) - 1
        with _synchronised(module, last):
            if engine is not None:
                engine.begin(last)
            with phase("forward"):
                loss = module(batch.inputs.to(world.device), batch.targets.to(world.device))
                share = loss * factor.to(loss.dtype).to(loss.device)
            with phase("backward"):
                if engine is not None:
                    engine.backward(share)
                else:
                    share.backward()
        nats += loss.detach().to(device, torch.float64)
    norm = torch.zeros(()) if engine else gradient_norm(module.parameters())
    norm = norm.to(device).to(torch.float64)
    told = [nats.unsqueeze(0), torch.tensor([own, int(flag)], dtype=torch.float64).to(device)]
    if is_sharded(module):
        # Each process has the norm of its own parts; the exchange takes the squares with it.
        *sums, square = world.sum(torch.cat([*told, norm.square().unsqueeze(0)])).unbind()
        norm = square.sqrt()
    else:
        sums = list(world.sum(torch.cat(told)).unbind())
    # The one place where the host waits for the device.
    total, tokens, flags, length = torch.stack([*sums, norm]).tolist()
    check_packed(tokens, own, world, packed)
    return Gradient(total / max(tokens, 1), length, int(tokens), int(flags))


def check_packed(tokens: float, own: int, world: World, packed: bool) -> None:
    """Raises `RuntimeError` if processes have different numbers of tokens without padding."""
    if packed and tokens != own * world.size:
        raise RuntimeError(
            f"packed batches of unequal size: {tokens:.0f} tokens on {world.size} processes, "
            f"{own} on this one"
        )


def loss_factor(own: int, world: World, packed: bool) -> Tensor:
    """What makes the sum over tokens the step's mean: processes / tokens, a float64 scalar.

    Processes, because `DistributedDataParallel`, FSDP2 and ZeRO take the mean over them; what is
    wanted is the sum.
    """
    tokens = torch.tensor(float(own), dtype=torch.float64).to(accumulator_device(world))
    tokens = tokens * world.size if packed else world.sum(tokens)
    return world.size / tokens.clamp(min=1)


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The Euclidean norm of all gradients together, in float32; of sharded ones the own parts'."""
    gradients = _gradients(parameters)
    if not gradients:
        return torch.zeros(())
    # Not `torch.nn.utils.get_total_norm`: it rounds the norms to the gradients' dtype.
    if gradients[0].is_cuda:
        norms = list(torch._foreach_norm(gradients, 2, dtype=torch.float32))
    else:  # there it copies what is in half precision
        norms = [norm_of(gradient).to(torch.float32) for gradient in gradients]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return norm


def clip(parameters: Iterable[nn.Parameter], norm: float, limit: float) -> None:
    """Scales the gradients, whose norm is `norm`, down to `limit` at most; 0 disables clipping."""
    if limit > 0 and norm > limit and (gradients := _gradients(parameters)):
        # Not `clip_grads_with_norm_`: it also scales what is below the limit, by 1 - 1e-6 / norm.
        # A tensor: as a number the factor would be rounded to the gradients' dtype on a CPU.
        factor = torch.tensor(limit / norm, dtype=torch.float32)
        torch._foreach_mul_(gradients, factor.to(gradients[0].device))


def _gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    return [local(item.grad) for item in parameters if item.grad is not None]


def reason_to_skip(
    gradient: Gradient, mean_loss: float | None, config: TrainConfig
) -> tuple[str, float] | None:
    """Why a step must be skipped, with the offending value; None if it is taken.

    Args:
        gradient: of the step.
        mean_loss: running mean of the previous losses, None while there are too few.
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


def accumulator_device(world: World) -> torch.device:
    """Where sums in float64 are taken."""
    # MPS has no float64
    return torch.device("cpu") if world.device.type == "mps" else world.device
