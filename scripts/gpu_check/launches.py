"""What a step asks of the device: launches and waits as the profiler sees them, beside those that
are counted without a GPU.

A step of matrices of one shape, without a refresh. A CPU launches nothing: there the operations
that reach torch's dispatcher are counted instead, without views.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from . import tracing
from .files import Json
from .methods import CORE, OTHERS, Method
from .modelled import Modelled
from .record import NO_TIME, Record
from .section import Context
from .workload import Model, gradient

#: How many launches there may be for each that is counted: products may take a second kernel.
AIM = 1.25
COUNTING = "lowrank.trainers.plan.launches"

Counter = Callable[..., Any]


def run(record: Record, context: Context) -> None:
    """Measures the main methods first."""
    count, modelled = counter(record), Modelled(record, context)
    model = context.size.models["1b"]
    for method in (*CORE, *OTHERS):
        if method.name is None:
            continue
        work = functools.partial(compare, record, context, model, method, count, modelled)
        if context.clock.left() < 2.0:
            record.skip(method.label, NO_TIME)
            continue
        record.attempt(method.label, work)


def counter(record: Record) -> Counter | None:
    """What counts a step's launches on fake tensors, if this checkout has it."""
    try:
        found: Counter = importlib.import_module(COUNTING).count_step
    except (ImportError, AttributeError) as error:
        record.facts["counting"] = f"not there: {error}"
        return None
    record.facts["counting"] = COUNTING
    return found


def compare(
    record: Record,
    context: Context,
    model: Model,
    method: Method,
    count: Counter | None,
    modelled: Modelled,
) -> None:
    """A step that is measured beside the same step counted."""
    shape, number = (model.hidden, model.hidden), 4 * model.layers
    memory = None
    if context.on_gpu and torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(context.device).total_memory
    counted = counts(method, model, shape, number, count, memory)
    times = modelled.of_launches(counted.pop("found", None))
    measured = observed(method, model, shape, number, context)
    unit, key = ("launches",) * 2 if "launches" in measured else ("operations", "started")
    details = measured | {"counted": counted} | times
    note = f"{number} matrices; "
    aim = None
    if counted.get("launches") is None:
        note += f"not counted: {counted['problem']}"
    else:
        aim = context.aim(AIM * counted["launches"] + 2)
        note += f"{counted['launches']} counted ({counted['reads']} reads)"
    if "synchronizing" in measured:
        note += f", {measured['synchronizing']} waits, {measured['device_ms']:.3g} ms of kernels"
    else:
        note += f", {measured['host_reads']} reads"
    if times:
        note += f", {times['modelled_device_ms']:.3g} ms of kernels modelled"
    record.add("step", method.label, measured[key], unit, aim=aim, note=note, details=details)


def counts(
    method: Method,
    model: Model,
    shape: tuple[int, int],
    number: int,
    count: Counter | None,
    memory: int | None = None,
) -> Json:
    """ "launches" and "reads" that are counted, and what "found" them, or "problem".

    `memory` is the card's.
    """
    if count is None:
        return {"launches": None, "problem": f"this checkout has no {COUNTING}"}
    try:
        found = count(method.name, shape, number, memory=memory, **method.keywords(model.rank))
    except Exception as error:  # of the counting alone: the step is measured all the same
        return {"launches": None, "problem": f"{type(error).__name__}: {error}"[:300]}
    launches = found.operations + found.filled + found.products + found.passes
    return {
        "launches": launches,
        "reads": found.reads,
        "by_name": dict(found.by_name),
        "found": found,
    }


def observed(
    method: Method, model: Model, shape: tuple[int, int], number: int, context: Context
) -> Json:
    """What a second step does; the first one fits the bases."""
    rows, columns = shape
    layers: dict[str, nn.Module] = {
        f"mlp_{i}": nn.Linear(
            columns, rows, bias=False, device=context.device, dtype=torch.bfloat16
        )
        for i in range(number)
    }
    matrices: Any = nn.ModuleDict(layers)
    optimizer = method.make(matrices, model.rank)
    for seed, weight in enumerate(matrices.parameters()):
        weight.grad = gradient(
            shape, seed, torch.empty(0, dtype=weight.dtype, device=weight.device)
        )
    optimizer.step()
    context.clock.synchronize()
    found = tracing.started(optimizer.step)
    if context.on_gpu:
        found |= tracing.device_work(optimizer.step)
        found |= tracing.host_waits(optimizer.step, context.root)
    return found
