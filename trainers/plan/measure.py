"""What a few real steps take, phase by phase, to hold against a plan."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lowrank.optimizers import (
    FactoredAdamW,
    build,
    convert,
    state_bytes,
)
from lowrank.optimizers import update_in_backward as attach

from ..memory import gradient_bytes, held_bytes
from ..models import checkpoint_activations
from ..phases import PhaseMeter
from .network import new_network, read_source


@dataclass(frozen=True)
class Measured:
    """Bytes of real steps.

    Attributes:
        weights: of parameters and buffers.
        gradients: after a backward pass.
        state: of the optimizer.
        peaks: the most that was allocated in "forward", "backward", "step" and "refresh".
    """

    weights: int
    gradients: int
    state: int
    peaks: Mapping[str, int]

    @property
    def peak(self) -> int:
        """The largest of them."""
        return max(self.peaks.values())


def measure(
    model: str,
    optimizer: str,
    *,
    sequence: int,
    batch: int = 1,
    accumulation: int = 1,
    steps: int = 3,
    skipped: int = 0,
    device: str = "cpu",
    dtype: str | None = None,
    checkpointing: bool | None = None,
    autocast: bool = False,
    update_in_backward: bool = False,
    refit: Any = "whole",
    options: Mapping[str, Any] | None = None,
) -> Measured:
    """Trains a model of random weights on random tokens for a few steps.

    Give `update_proj_gap` such that a later refresh is among them; the first step has one anyway.

    Args:
        model: as for `plan`, like the arguments of the same names.
        optimizer: one of `available()`.
        sequence: tokens of a sequence.
        batch: sequences of a micro-batch.
        accumulation: micro-batches of a step.
        steps: how many are measured.
        skipped: how many are taken before, such as the first one with its refits.
        device: "cpu", where the profiler's record of allocations is read, or a GPU.
        dtype: of the weights.
        checkpointing: recompute each block.
        autocast: products in bfloat16 over float32 weights.
        update_in_backward: update parameters in the backward pass.
        refit: of `update_in_backward`.
        options: of `build`.

    Raises:
        ValueError: as `plan`.
    """
    source = read_source(model, sequence, dtype, checkpointing, autocast)
    where = torch.device(device)
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device={device!r}: there is no GPU to measure on; accepted here is device='cpu'"
        )
    options = dict(options or {})
    with PhaseMeter(where) as meter, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with meter.phase("model"):
            network = new_network(source, where)
            if source.checkpointing:
                checkpoint_activations(network.network)
            convert(optimizer, network.network, **options)
        with meter.phase("optimizer"):
            trained = build(optimizer, network.network, **options)
        if update_in_backward:
            attach(trained, accumulation, refit=refit)
        happened: list[Any] = []
        trained.register_refresh_hook(happened.append)
        if isinstance(trained, FactoredAdamW):
            trained.register_event_hook(happened.append)
        weights = held_bytes(network)
        vocabulary = network.network.get_input_embeddings().num_embeddings
        names: dict[str, str] = {}
        gradients = 0
        for step in range(-skipped, steps):
            called = "" if step >= 0 else "skipped "
            for _ in range(accumulation):
                tokens = torch.randint(vocabulary, (batch, sequence), device=where)
                with meter.phase(f"{called}forward"):
                    loss = network(tokens, tokens)
                with meter.phase(f"{called}backward"):
                    (loss * (1 / tokens.numel())).backward()
                del loss
            gradients = max(gradients, gradient_bytes(network))
            before = len(happened) if update_in_backward else 0
            with meter.phase(f"step {step}"):
                trained.step()
            if step >= 0:
                names[f"step {step}"] = "refresh" if len(happened) > before else "step"
            happened.clear()
            trained.zero_grad()
    peaks = {name: meter.peaks[name] for name in ("forward", "backward")}
    for called, name in names.items():
        peaks[name] = max(peaks.get(name, 0), meter.peaks[called])
    return Measured(weights, gradients, state_bytes(trained), peaks)
