"""Every device kernel beside its reference, optimizers beside pure torch, and bandwidths."""

from __future__ import annotations

import functools
import importlib
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

from lowrank.cuda import status, using_kernels

from . import bandwidth
from .files import Json
from .record import NO_TIME, Record
from .section import Context

#: Share of the section's time for comparing; bandwidths have the rest.
COMPARING = 0.8


def run(record: Record, context: Context) -> None:
    """Compares first, then measures."""
    for folder in ("tests", "tests/cuda", "tests/optimizers"):
        sys.path.append(str(context.root / folder))
    name = "cuda" if context.on_gpu else "host"
    found = status(name)
    usable = found.runs_on(context.device)
    record.facts["library"] = found.detail
    comparisons: dict[str, Callable[[], Json]] = {}
    if usable:
        add = functools.partial(_add_kernels, comparisons, context)
        record.attempt("kernel cases", add, again=True)
    else:
        # A failed check of `build`, too; what runs then is plain torch, and is measured.
        detail = f"the {name} library is not used: {found.detail}; plain torch is measured"
        record.check("the kernels are there", False, detail)
    for module in ("device_cases", "device_optimizer_cases"):
        add = functools.partial(_add_cases, comparisons, module, context)
        record.attempt(module.replace("_", " "), add, again=True)
    if context.on_gpu:
        add = functools.partial(_add_plain, comparisons, context)
        record.attempt("plain torch", add, again=True)
    record.facts["to_compare"] = list(comparisons)
    record.save()
    end = context.clock.left() * (1 - COMPARING)
    for label, compare in comparisons.items():
        if context.clock.left() < end:
            record.skip(label, NO_TIME)
            continue
        record.attempt(label, functools.partial(_compared, record, label, compare), clean=False)
    bandwidth.run(record, context)


def _compared(record: Record, label: str, compare: Callable[[], Json]) -> None:
    begin = time.monotonic()
    found = compare()
    passed = not found.get("detail")
    found.setdefault("detail", "")
    record.check(label, passed, **found, seconds=round(time.monotonic() - begin, 3))


def _add_kernels(found: dict[str, Callable[[], Json]], context: Context) -> None:
    """The tests' cases of kernels, on inputs drawn from seeds."""
    draws: Any = importlib.import_module("draws")
    for module in ("kernel_cases", "exact_cases"):
        for case in importlib.import_module(module).CASES:
            label = f"{module.partition('_')[0]}: {case.__name__}"
            found[label] = functools.partial(draw_cases, case, draws.SeededDraw, context)


def _add_plain(found: dict[str, Callable[[], Json]], context: Context) -> None:
    """Cases of plain torch that has the same bits everywhere."""
    draws: Any = importlib.import_module("draws")
    for case in importlib.import_module("kernel_cases").EXACT:
        draw = functools.partial(_on_both, draws.SeededDraw)
        label = f"plain torch on the GPU and the CPU: {case.__name__}"
        found[label] = functools.partial(draw_cases, case, draw, context)


def _on_both(draw: Any, seed: int, device: torch.device) -> Any:
    """Plain torch on the device beside plain torch on the CPU."""
    made = draw(seed, device)
    made.reference, made.plain = torch.device("cpu"), True
    return made


def draw_cases(case: Callable[[Any], None], draw: Any, context: Context) -> Json:
    """Runs a case on several inputs; stops at the first that fails.

    Returns:
        "draws", and for a failure "detail" with the seed and what a reference on the CPU says.
    """
    begin = time.monotonic()
    for seed in range(context.size.draws):
        # Whatever a slow case costs, it meets its reference a few times.
        if seed >= 3 and time.monotonic() - begin > 2.0:
            return {"draws": seed}
        problem = _problem(case, draw(seed, context.device))
        if problem:
            detail = f"seed {seed}: {problem}"
            found: Json = {"draws": seed + 1, "seed": seed}
            if context.on_gpu and not draw(seed, context.device).plain:
                elsewhere = draw(seed, context.device)
                elsewhere.reference = torch.device("cpu")
                said = _problem(case, elsewhere)
                found["with_a_reference_on_the_cpu"] = said or "equal"
                detail += f"; with a reference on the CPU: {said or 'equal'}"[:400]
            return found | {"detail": detail}
    return {"draws": context.size.draws}


def _problem(case: Callable[[Any], None], draw: Any) -> str:
    """What an input shows to be wrong; empty for nothing.

    Raises:
        RuntimeError: a launch failed; the device may be lost.
    """
    try:
        with using_kernels("native"):
            case(draw)
    except AssertionError as error:
        return " ".join(str(error).split())[:700] or _where(error)
    return ""


def _where(error: BaseException) -> str:
    """The line that failed, of an assertion without a message."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.name}, line {frame.lineno}: {frame.line}"


def _add_cases(found: dict[str, Callable[[], Json]], module: str, context: Context) -> None:
    """The tests' other cases."""
    for case in importlib.import_module(module).CASES:
        if context.on_gpu or not case.cuda:
            found[case.name] = functools.partial(_hold, case.holds, context.device)


def _hold(holds: Callable[[torch.device], None], device: torch.device) -> Json:
    torch.manual_seed(0)
    try:
        holds(device)
    except AssertionError as error:
        return {"detail": " ".join(str(error).split())[:700] or _where(error)}
    return {}
