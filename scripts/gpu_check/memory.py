"""Peak memory of training steps, phase by phase, and the optimizers' state against its formula."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from lowrank.optimizers import build, expected_state_bytes, state_bytes

from . import pretraining
from .files import Json
from .llama import llama
from .record import NO_TIME, Record
from .section import Context
from .tracing import events_of
from .workload import Model

_PHASE = "phase: "
#: Bytes that a step without a refresh may add to what is there: two lists of bounded scratch.
STEP_SCRATCH = 600e6
#: Bytes of activations beside 34 h a token and layer, of the largest model.
MARGIN = 4 << 30


@dataclass(frozen=True)
class Trial:
    """A method and what it is built with.

    Attributes:
        label: for people.
        name: as `build` knows it.
        options: of `build`, beside rank and refresh.
        weight_bytes: of an entry of a projected weight.
        projects: whether it refreshes bases from the gradient's decomposition.
    """

    label: str
    name: str
    options: Json = field(default_factory=dict)
    weight_bytes: float = 2.0
    projects: bool = True

    def keywords(self, model: Model) -> Json:
        """Of `build`."""
        options: Json = {"rank": model.rank, "update_proj_gap": 1_000_000}
        if self.projects:
            options |= {"refresh": "randomized"}
        return options | self.options


TRIALS = (
    Trial("galore_adamw_8bit", "galore_adamw_8bit"),
    Trial("qgalore_adamw_8bit, INT8 weights", "qgalore_adamw_8bit", weight_bytes=1.0 + 4 / 256),
    Trial("apollo_mini_adamw", "apollo_mini_adamw", {"rank": 1}, projects=False),
    Trial("adamw", "adamw", projects=False),
)


class Meter:
    """Bytes that are allocated, and their peak, phase by phase, of what is done inside of it.

    On a GPU the bytes are those of torch's allocator, above what there was before; on a CPU those
    of the profiler's record of allocations, known at the end.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._base = torch.cuda.memory_allocated() if self._on_gpu else 0
        self._profile: profile | None = None
        self.peaks: dict[str, int] = {}
        self.ends: dict[str, int] = {}

    def __enter__(self) -> Meter:
        if not self._on_gpu:
            self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self._profile.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        if self._profile is not None:
            self._profile.__exit__(*error)  # type: ignore[no-untyped-call]
            if error[0] is None:
                self._read(events_of(self._profile))
            self._profile = None

    def phase(self, name: str, work: Callable[[], Any]) -> Any:
        """Does some work; its peak and what remains go under its name."""
        if not self._on_gpu:
            with record_function(_PHASE + name):
                return work()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        result = work()
        torch.cuda.synchronize()
        self.peaks[name] = torch.cuda.max_memory_allocated() - self._base
        self.ends[name] = torch.cuda.memory_allocated() - self._base
        return result

    def _read(self, events: list[Any]) -> None:
        """Peaks from allocations in the order of time."""
        phases = sorted(
            (event.start_ns(), event.start_ns() + event.duration_ns(), event.name())
            for event in events
            if event.name().startswith(_PHASE)
        )
        changes = sorted(
            (event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"
        )
        now = at = 0
        for begin, end, name in phases:
            while at < len(changes) and changes[at][0] < begin:
                now += changes[at][1]
                at += 1
            peak = now
            while at < len(changes) and changes[at][0] <= end:
                now += changes[at][1]
                peak = max(peak, now)
                at += 1
            self.peaks[name.removeprefix(_PHASE)] = peak
            self.ends[name.removeprefix(_PHASE)] = now

    def scratch(self, name: str, before: str) -> int:
        """Bytes at the peak of a phase above what there was before."""
        return self.peaks[name] - self.ends[before]


def run(record: Record, context: Context) -> None:
    """Small models first; the largest one by the methods that are made for it, then for real."""
    models = context.size.models
    plan = [(models[name], trial) for name in ("60m", "1b", "7b") for trial in TRIALS[:3]]
    plan += [(models["1b"], TRIALS[3]), (models["60m"], TRIALS[3])]
    for model, trial in plan:
        label = f"{model.name} {trial.label}"
        record.attempt(label, functools.partial(_trial, record, context, model, trial))
    pretraining.run(record, context)


def _trial(record: Record, context: Context, model: Model, trial: Trial) -> None:
    label = f"{model.name} {trial.label}"
    if context.clock.left() < 3.0:
        record.skip(label, NO_TIME)
        return
    needed = estimate(model, trial, context.size.sequence)
    if context.on_gpu:
        free, _ = torch.cuda.mem_get_info()
        if needed > free:
            record.skip(label, f"needs {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free")
            return
    length = context.size.sequence
    torch.manual_seed(0)
    tokens = torch.randint(model.vocabulary, (1, length), device=context.device)
    losses: list[float] = []
    with Meter(context.device) as meter:
        network, kind = meter.phase("model", lambda: llama(model, context.device, length))
        expected = expected_state_bytes(trial.name, network, **trial.keywords(model))
        optimizer = meter.phase(
            "optimizer", lambda: build(trial.name, network, lr=1e-4, **trial.keywords(model))
        )
        for step in range(2):  # the first one fits the bases
            loss = meter.phase(f"forward {step}", lambda: network(tokens))
            meter.phase(f"backward {step}", loss.backward)
            losses.append(float(loss.detach()))
            del loss
            meter.phase(f"step {step}", optimizer.step)
            meter.phase(f"zero_grad {step}", optimizer.zero_grad)
    measured = state_bytes(optimizer)
    record.check(
        f"{label}: state bytes", measured == expected, f"{measured} measured, {expected} expected"
    )
    finite = all(map(math.isfinite, losses))
    record.check(f"{label}: losses are finite", finite, f"{losses}")
    _add(record, context, model, trial, meter, network, measured, kind)


def _add(
    record: Record,
    context: Context,
    model: Model,
    trial: Trial,
    meter: Meter,
    network: nn.Module,
    state: int,
    kind: str,
) -> None:
    weights = sum(param.nbytes for param in network.parameters())
    gradients = 2 * model.parameters()
    peak = max(meter.peaks.values())
    step, refresh = (meter.scratch(f"step {i}", f"backward {i}") for i in (1, 0))
    details: Json = {
        "peaks": meter.peaks,
        "ends": meter.ends,
        "weight_bytes": weights,
        "gradient_bytes": gradients,
        "state_bytes": state,
        "model": kind,
        "tokens": context.size.sequence,
    }
    most = max(meter.peaks, key=lambda name: meter.peaks[name])
    held = weights + gradients + state
    note = f"in {most}; {peak / held:.2f} x weights, gradients and state ({state / 1e9:.3g} GB)"
    record.add(model.name, f"{trial.label}: peak", peak / 1e9, "GB", note=note, details=details)
    record.add(
        model.name,
        f"{trial.label}: a step adds",
        max(step, 0) / 1e9,
        "GB",
        aim=context.aim(STEP_SCRATCH / 1e9),
        note=f"{max(refresh, 0) / 1e9:.3g} GB with the first fit",
    )


def estimate(model: Model, trial: Trial, length: int) -> float:
    """Bytes that two steps take at most: weights, gradients, state, activations and a margin."""
    projected = sum(m * n for m, n in model.projected())
    plain = model.parameters() - projected
    weights = max(trial.weight_bytes, 2.0) * projected + 2.0 * plain
    low = sum(max(s) * min(model.rank, *s) + min(s) * model.rank for s in model.projected())
    state = 8.0 * model.parameters() if trial.name == "adamw" else 8.0 * plain + 4.0 * low
    activations = 2.0 * length * model.layers * (17 * model.hidden + 6 * model.inner)
    logits = 12.0 * length * model.vocabulary
    margin = MARGIN * min(1.0, model.hidden / 4096)
    return weights + 2.0 * model.parameters() + state + activations + logits + margin
