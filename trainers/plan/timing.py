"""A model of the time of a training step on a GPU, from counted operations; nothing is measured.

Operations follow each other on a device that stays busy, each of which takes the longest of what
its launches, its bytes and its arithmetic take at least (`Speed.seconds`). The host starts them,
which takes it `Speed.launch` a launch, and waits for numbers that it reads. A part of a step takes
the longer of what device and host take; a captured one the device's time and a graph's replay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from lowrank.optimizers import (
    expected_state_bytes,
    expected_step_traffic,
    expected_weight_bytes,
)

from .counted import count_steps
from .estimate import Setting, check_rank
from .fakes import blocks_of
from .launches import Launches
from .network import Network, new_network
from .passes import Passes, passes_of
from .planner import asked, options_by_method
from .sharded import check_divisible, quantised_bits
from .speed import Speed, card_speed


@dataclass(frozen=True)
class Part:
    """A part of a step.

    Attributes:
        name: of it.
        launches: of kernels, of one micro-batch after another.
        device: seconds that the GPU is busy.
        host: seconds that the host takes to start it.
    """

    name: str
    launches: float
    device: float
    host: float

    @property
    def seconds(self) -> float:
        """What it takes: the longer of the two."""
        return max(self.device, self.host)


@dataclass(frozen=True)
class StepTime:
    """A modelled step.

    Attributes:
        model: as it was given.
        optimizer: its name.
        setting: everything else that was asked for, by name.
        speed: of the card.
        passes: forward and backward passes of all micro-batches.
        step: the optimizer's between refreshes.
        refreshing: its step that refits all bases; None where all steps are the same.
        gap: steps from one refresh to the next; None as well.
        wire: seconds of collectives, if nothing is computed meanwhile; None for one process.
        tokens: of a step, of all processes together.
        notes: what the numbers leave out.
    """

    model: str
    optimizer: str
    setting: Mapping[str, Any]
    speed: Speed
    passes: Part
    step: Part
    refreshing: Part | None
    gap: int | None
    wire: float | None
    tokens: int
    notes: tuple[str, ...] = ()

    @property
    def refresh(self) -> float:
        """Seconds that refreshes add to a step on average."""
        if self.refreshing is None or self.gap is None:
            return 0.0
        return max(0.0, self.refreshing.seconds - self.step.seconds) / self.gap

    @property
    def optimizer_seconds(self) -> float:
        """Of the optimizer in a step, refreshes on average."""
        return self.step.seconds + self.refresh

    @property
    def seconds(self) -> float:
        """Of a whole step, refreshes on average."""
        return self.passes.seconds + self.optimizer_seconds + (self.wire or 0.0)

    @property
    def worst(self) -> float:
        """Of a step in which all bases are refitted."""
        most = self.step if self.refreshing is None else self.refreshing
        return self.passes.seconds + most.seconds + (self.wire or 0.0)

    @property
    def captured(self) -> float:
        """Seconds of the optimizer's step between refreshes as a replayed CUDA graph."""
        return self.step.device + self.speed.replay

    def to_dict(self) -> dict[str, Any]:
        """For JSON; times in milliseconds."""
        parts = (self.passes, self.step, *([] if self.refreshing is None else [self.refreshing]))
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            **self.setting,
            "modelled": True,
            "card": self.speed.name,
            "assumed": dict(self.speed.assumed),
            "parts": {
                part.name: {
                    "launches": part.launches,
                    "device_ms": 1e3 * part.device,
                    "host_ms": 1e3 * part.host,
                    "ms": 1e3 * part.seconds,
                }
                for part in parts
            },
            "update_proj_gap": self.gap,
            "refresh_ms": 1e3 * self.refresh,
            "captured_ms": 1e3 * self.captured,
            "wire_ms": None if self.wire is None else 1e3 * self.wire,
            "optimizer_ms": 1e3 * self.optimizer_seconds,
            "step_ms": 1e3 * self.seconds,
            "worst_step_ms": 1e3 * self.worst,
            "tokens_per_step": self.tokens,
            "tokens_per_second": self.tokens / self.seconds,
            "optimizer_share": self.optimizer_seconds / self.seconds,
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class NotModelled:
    """A method that has no modelled step, and why."""

    optimizer: str
    why: str

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"optimizer": self.optimizer, "not_modelled": self.why}


def part_of(name: str, counted: Launches, speed: Speed) -> Part:
    """What counted operations take a card."""
    device = sum(number * speed.seconds(work) for work, number in counted.work.items())
    host = counted.launches * speed.launch + counted.reads * speed.read
    return Part(name, counted.launches, device, host)


def step_time(model: str, optimizer: str, *, card: str | None = None, **more: Any) -> StepTime:
    """Models a training step on a card.

    Args:
        model: as for `plan`, like all others.
        optimizer: one of `available()` that doesn't replace layers.
        card: a card whose speed is known (`speed.DATA_SHEETS`).
        **more: other arguments of `plan`, but `memory`.

    Raises:
        ValueError: as `plan`; the card is unknown or its speed is; the device is a CPU; parameters
            are updated in the backward pass; or the method replaces layers.
    """
    speed = _speed(card, more)
    setting = asked(model, optimizer, card=card, **more)
    return _modelled(model, setting, speed, _passes(setting))


def rank_times(model: str, *, card: str | None = None, **more: Any) -> list[StepTime | NotModelled]:
    """Models every method of `available()`; the shortest whole step comes first.

    Args:
        model: as for `plan`.
        card: as for `step_time`.
        **more: of `plan`, but `optimizer` and `memory`. Options that a method doesn't have are left
            out for it, if some method has them.

    Raises:
        ValueError: as `step_time`, for what is wrong with all methods.
    """
    speed = _speed(card, more)
    options = more.pop("options", None) or {}
    asked(model, "adamw", card=card, **more)
    passes: Passes | None = None
    found: list[StepTime] = []
    lacking: list[NotModelled] = []
    for name, own in options_by_method(options):
        try:
            setting = asked(model, name, card=card, options=own, **more)
            passes = passes or _passes(setting)
            found.append(_modelled(model, setting, speed, passes))
        except ValueError as error:
            lacking.append(NotModelled(name, str(error)))
    return [*sorted(found, key=lambda one: one.seconds), *lacking]


def _speed(card: str | None, more: Mapping[str, Any]) -> Speed:
    if more.get("device", "cuda") != "cuda":
        raise ValueError(
            f"device={more['device']!r} with times: modelled are GPUs, accepted is 'cuda'"
        )
    if more.get("memory") is not None:
        raise ValueError(
            f"memory={more['memory']!r} with times: accepted is a card, whose speed is known"
        )
    if card is None:
        raise ValueError("card=None with times: accepted is the name of a card, such as H100")
    if more.get("update_in_backward"):
        raise ValueError(
            "update_in_backward=True with times: modelled are steps of all parameters together"
        )
    return card_speed(card)


def _network(setting: Setting) -> Network:
    return new_network(setting.source, torch.device("meta"))


def _passes(setting: Setting) -> Passes:
    return passes_of(_network(setting), setting.source, setting.batch, setting.sequence)


def _modelled(model: str, setting: Setting, speed: Speed, passes: Passes) -> StepTime:
    whole = _network(setting)
    check_rank(setting, blocks_of(whole, setting.source))
    wire, notes = collectives(setting, whole, speed)
    steps = count_steps(
        setting.optimizer,
        lambda: cast("nn.Module", _network(setting).network),
        memory=setting.memory,
        options=setting.options,
    )
    refreshing = steps.refreshing
    return StepTime(
        model=model,
        optimizer=setting.optimizer,
        setting=setting.described(),
        speed=speed,
        passes=_part_of_passes(passes, setting.accumulation, speed),
        step=part_of("optimizer step", steps.usual, speed),
        refreshing=None if refreshing is None else part_of("step with refresh", refreshing, speed),
        gap=steps.gap,
        wire=wire,
        tokens=setting.batch * setting.accumulation * setting.sequence * setting.world,
        notes=(*passes.notes, *notes, *_of_weights(setting, whole)),
    )


def _of_weights(setting: Setting, whole: Network) -> list[str]:
    """What a time doesn't say: that quantised weights cost passes, and that a run can't be."""
    notes = []
    if quantised_bits(setting.optimizer, setting.options) is not None:
        notes.append(
            "the passes are those of dense weights: dequantising quantised ones is left out"
        )
    if setting.memory is not None and setting.strategy != "fsdp2":
        method, network = setting.optimizer, cast("nn.Module", whole.network)
        held = sum(param.nbytes for param in whole.parameters() if param.requires_grad)
        held += expected_weight_bytes(method, network, **setting.options)
        held += expected_state_bytes(method, network, **setting.options)
        if held > setting.memory:
            notes.append(
                "weights, gradients and the optimizer's state alone take more than the card's "
                "memory; the plan without times says what fits"
            )
    return notes


def _part_of_passes(passes: Passes, accumulation: int, speed: Speed) -> Part:
    computing = passes.flops / (speed.flops[passes.unit] * speed.passes)
    device = max(computing, passes.moved / speed.bandwidth, passes.launches * speed.kernel)
    return Part(
        "forward + backward",
        accumulation * passes.launches,
        accumulation * device,
        accumulation * passes.launches * speed.launch,
    )


def collectives(
    setting: Setting, whole: Network, speed: Speed
) -> tuple[float | None, tuple[str, ...]]:
    """Seconds of collectives, and what they leave out.

    In a ring of w processes each sends (w - 1) / w of the whole of what is gathered or reduced, and
    twice that of what is summed for all.
    """
    if setting.strategy is None:
        return None, ()
    if speed.link is None:
        raise ValueError(f"world={setting.world}: the speed of links of {speed.name} is not known")
    notes = ["collectives are taken not to overlap with what is computed, over links of one node"]
    gradients = sum(param.nbytes for param in whole.parameters() if param.requires_grad)
    sent: float = 2 * gradients
    if setting.strategy == "fsdp2":
        check_divisible(setting.optimizer, setting.options)
        own = expected_step_traffic(
            setting.optimizer, whole.network, setting.world, **setting.options
        )
        weights = sum(param.nbytes for param in whole.parameters())
        sent = setting.accumulation * (2 * weights + gradients) + 2 * own
        notes.append("the optimizer's step is that of one process, an upper bound for parts")
    return sent * (setting.world - 1) / setting.world / speed.link, tuple(notes)
