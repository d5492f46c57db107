"""One optimizer step on a model's parameters, without its refreshes, beside its own floor."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.optim import Optimizer

from lowrank.cuda import status, using_kernels
from lowrank.optimizers import state_bytes_by_category

from . import tracing
from .files import Json
from .methods import CORE, OTHERS, Method
from .modelled import Modelled
from .record import NO_TIME, Record
from .section import Context
from .workload import SIZES, Model, fill, made

#: What a step may take of its floor.
AIM = 1.25
#: How many times longer a first step takes at 1b than at 60m, at most.
GROWTH = 20.0
#: Share of the time left that a first step may be expected to take.
SHARE = 0.25
_TORCH = CORE[0].label
#: Of those at 7b, what is timed first.
LARGE = (CORE[0].label, "galore_adamw", "fira_adamw", "qgalore_adamw_8bit, INT8 weights")
#: Of kernels beside plain torch.
PLAIN = ("galore_adamw", "galore_adamw_8bit", "qgalore_adamw_8bit, INT8 weights", "fira_adamw")

Step = tuple[str, Callable[[], None]]


def run(record: Record, context: Context) -> None:
    """Times steps, the main methods and the middle sizes first."""
    found = status("cuda" if context.on_gpu else "host")
    kind = "compiled" if found.runs_on(context.device) else "plain torch"
    record.facts["kernels"] = f"{kind}: {found.detail}"
    steps = Steps(record, context)
    record.attempt("warm up", steps.warm_up)
    for label, work in steps.plan():
        record.attempt(label, work)
    Modelled(record, context).fill()


def check_gradients(optimizer: Optimizer) -> None:
    """Raises where a step would pass over parameters: it would be timed too short.

    Raises:
        RuntimeError: a parameter has no gradient.
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    lacking = sum(param.grad is None for param in params)
    if lacking or not params:
        raise RuntimeError(f"{lacking} of {len(params)} parameters have no gradient")


class Steps:
    """The measurements of this section, and what they know of each other."""

    def __init__(self, record: Record, context: Context) -> None:
        self._record, self._context = record, context
        self._compiled = str(record.facts.get("kernels", "")).startswith("compiled")
        self._first: dict[tuple[str, str], float] = {
            (row.group, row.name): row.details["first_step_s"]
            for row in record.rows
            if "first_step_s" in row.details
        }

    def warm_up(self) -> None:
        """Loads kernels and solvers, which the first steps that are timed would pay for."""
        if self._context.clock.left() < 3.0:
            return
        model = SIZES["tiny"].models["60m"]
        for method in (*CORE, *OTHERS):
            self._ready(model, method)

    def plan(self) -> Iterator[Step]:
        """Labels and what to do, in the order of their worth."""
        models = self._context.size.models
        for name in ("60m", "1b"):
            for method in CORE:
                yield from self._both(method, models[name])
        for method in CORE:
            if method.label in LARGE:
                yield next(iter(self._both(method, models["7b"])))
        for method in OTHERS:
            for name in ("60m", "1b"):
                yield from self._both(method, models[name])
        for method in CORE:  # what was measured is not measured again
            yield from self._both(method, models["7b"])
        for method in CORE:
            if method.label in PLAIN and self._compiled:
                label = f"1b {method.label}, plain torch"
                yield label, functools.partial(self._plain, models["1b"], method)

    def _both(self, method: Method, model: Model) -> Iterator[Step]:
        """A step as it is called and, where that can be, captured."""
        label = f"{model.name} {method.label}"
        yield label, functools.partial(self._eager, model, method)
        if method.capturable and self._context.on_gpu:
            yield f"{label}, graph", functools.partial(self._graph, model, method)

    def _affords(self, model: Model, method: Method, what: str) -> bool:
        """Whether there is time and memory; says so if not."""
        context, label = self._context, f"{model.name} {what}"
        left = context.clock.left()
        first = self._first.get(("60m", method.label), 0.0)
        expected = first * GROWTH if model.name != "60m" else 0.0
        if left < 3.0:
            self._record.skip(label, NO_TIME)
            return False
        if expected > SHARE * left:
            reason = f"{NO_TIME} for a first step of {expected:.0f} s"
            self._record.skip(label, reason)
            return False
        if context.on_gpu:
            weights = (2.0 + method.weight_bytes) * model.parameters()
            needed = weights + method.state_bytes(model) + (3 << 30)
            free, _ = torch.cuda.mem_get_info()
            if needed > free:
                reason = f"needs {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"
                self._record.skip(label, reason)
                return False
        return True

    def _ready(self, model: Model, method: Method, **more: Any) -> tuple[Optimizer, float]:
        """An optimizer after its first step, and the seconds that this took."""
        matrices = made(model, self._context.device)
        optimizer = method.make(matrices, model.rank, **more)
        fill(matrices)
        check_gradients(optimizer)
        self._context.clock.synchronize()
        begin = time.perf_counter()
        optimizer.step()
        self._context.clock.synchronize()
        return optimizer, time.perf_counter() - begin

    def _eager(self, model: Model, method: Method) -> None:
        if not self._affords(model, method, method.label):
            return
        context = self._context
        optimizer, first = self._ready(model, method)
        self._first[model.name, method.label] = first
        timing = context.clock.measure(optimizer.step, most=context.size.samples, seconds=0.5)
        details: Json = timing.as_dict() | {"first_step_s": first}
        details |= tracing.operations(optimizer.step)
        if context.on_gpu:
            details |= tracing.device_work(optimizer.step)
            details |= tracing.host_waits(optimizer.step, context.root)
        state = state_bytes_by_category(optimizer)
        self._add(model, method, method.label, timing.median, details | {"state_bytes": state})

    def _graph(self, model: Model, method: Method) -> None:
        label = f"{method.label}, graph"
        if not self._affords(model, method, label):
            return
        context = self._context
        try:
            optimizer, _ = self._ready(model, method, capturable=True)
        except ValueError as error:  # what can't be captured says so
            self._record.skip(f"{model.name} {label}", str(error))
            return
        call = tracing.graphed(optimizer.step)
        timing = context.clock.measure(call, most=context.size.samples, seconds=0.3)
        state = state_bytes_by_category(optimizer)
        details: Json = timing.as_dict() | {"state_bytes": state}
        self._add(model, method, label, timing.median, details)

    def _add(self, model: Model, method: Method, label: str, ms: float, details: Json) -> None:
        parts: list[str] = []
        aim = None
        rates = self._context.rates
        if rates is not None:
            floor = method.floor(model, details["state_bytes"], rates)
            details |= {"floor_ms": floor, "of_floor": ms / floor}
            parts.append(f"{ms / floor:.2f} x floor")
            aim = self._context.aim(AIM * floor)
        fused = self._record.value(model.name, _TORCH)
        if fused is not None and method.name is not None:
            details["of_fused_adamw"] = ms / fused
            parts.append(f"{ms / fused:.2f} x AdamW")
        if "launches" in details:
            parts.append(f"{details['launches']} launches, {details['device_ms']:.3g} ms of them")
            parts.append(f"{details['synchronizing']} waits")
        elif "operations" in details:
            parts.append(f"{details['operations']} operations, {details['host_reads']} reads")
        self._record.add(
            model.name, label, ms, "ms", aim=aim, note=", ".join(parts), details=details
        )

    def _plain(self, model: Model, method: Method) -> None:
        """The same step without compiled kernels."""
        label = f"{method.label}, plain torch"
        if not self._affords(model, method, label):
            return
        with using_kernels("torch"):
            optimizer, _ = self._ready(model, method)
            timing = self._context.clock.measure(optimizer.step, most=5, seconds=1.0, warm=1)
        own = self._record.value(model.name, method.label)
        note = "" if own is None else f"{timing.median / own:.2f} x compiled"
        self._record.add(
            model.name, label, timing.median, "ms", note=note, details=timing.as_dict()
        )
