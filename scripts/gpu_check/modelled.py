"""Steps as `lowrank plan --time` models them, with the rates that this device was measured to have.

Operations are counted on fake tensors of a GPU, whatever the device is: on a CPU the figures only
show that the model runs.
"""

from __future__ import annotations

import functools
import importlib
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from .files import Json
from .methods import CORE, OTHERS, Method
from .record import Record, Row
from .section import Context
from .workload import Model, made

PLAN = "lowrank.trainers.plan"
GRAPH = ", graph"
#: Seconds that counting may take of a section: a card waits meanwhile.
MOST = 20.0

Part = Any


class Modelled:
    """What steps should take, as far as this checkout can say it.

    Attributes:
        problem: why nothing is modelled; None where it is.
    """

    def __init__(self, record: Record, context: Context) -> None:
        self._record, self._context = record, context
        self._known: dict[tuple[Model, str], Part] = {}
        self._speed: Any = None
        self.problem: str | None = None
        try:
            self._timing = importlib.import_module(f"{PLAN}.timing")
            self._counted = importlib.import_module(f"{PLAN}.counted")
            speed = importlib.import_module(f"{PLAN}.speed")
        except ImportError as error:  # of another checkout, or without the trainer's needs
            self.problem = f"not there: {error}"
        else:
            self._speed = self._measured(speed)
        record.facts["modelling"] = self.problem or PLAN

    def _measured(self, speed: Any) -> Any:
        rates = self._context.rates
        if rates is None:
            self.problem = "the device's rates were not measured"
            return None
        flops = {"bf16": rates.bf16, "fp32": rates.fp32, "tf32": rates.tf32, "fp64": rates.fp64}
        return speed.measured_speed(
            str(self._context.device),
            1e3 * rates.copy,
            {unit: 1e3 * rate for unit, rate in flops.items() if rate},
            None if rates.launch is None else 1e-3 * rates.launch,
        )

    def of_launches(self, found: Any) -> Json:
        """Milliseconds of a step that was counted; nothing where that can't be said."""
        if self._speed is None or not hasattr(found, "work"):
            return {}
        return _milliseconds(self._timing.part_of("step", found, self._speed))

    def fill(self) -> None:
        """Gives each row of a step what is modelled of it, those that were measured first first."""
        if self._speed is None:
            return
        methods = {method.label: method for method in (*CORE, *OTHERS) if method.name}
        end = time.monotonic() + MOST
        lacking: list[str] = []
        for row in list(self._record.rows):
            graph = row.name.endswith(GRAPH)
            method = methods.get(row.name.removesuffix(GRAPH))
            model = self._context.size.models.get(row.group)
            if method is None or model is None or "modelled_ms" in row.details:
                continue
            known = _key(model, method) in self._known
            if not known and (time.monotonic() > end or self._context.clock.left() < 2.0):
                lacking.append(f"{row.group} {row.name}")
                continue
            work = functools.partial(self._beside, row, model, method, graph=graph)
            self._record.attempt(f"{row.group} {row.name}: modelled", work, clean=False)
        if lacking:
            self._record.skip(f"modelled: {', '.join(lacking)}", f"{MOST:.0f} s are for counting")

    def _beside(self, row: Row, model: Model, method: Method, *, graph: bool) -> None:
        found = self._part(model, method)
        times = _milliseconds(found)
        if graph:
            times["modelled_ms"] = 1e3 * (found.device + self._speed.replay)
        ms, kernels = times["modelled_ms"], times["modelled_device_ms"]
        row.details |= times
        self._record.add(
            row.group,
            f"{row.name}: modelled",
            ms,
            "ms",
            note=f"{ms / row.value:.2f} x measured, {kernels:.3g} ms of kernels",
            details=dict(times),
        )

    def _part(self, model: Model, method: Method) -> Part:
        """A step's times by the model."""
        key = _key(model, method)
        if key not in self._known:
            memory = None
            if self._context.on_gpu:
                memory = torch.cuda.get_device_properties(self._context.device).total_memory
            make: Callable[[], Any] = functools.partial(made, model, "meta")
            counted = self._counted.count_steps(
                method.name,
                make,
                memory=memory,
                options=method.keywords(model.rank),
                refreshing=False,
            )
            self._known[key] = self._timing.part_of("step", counted.usual, self._speed)
        return self._known[key]


def _key(model: Model, method: Method) -> tuple[Model, str]:
    """What steps have in common that ask the same: small models differ in their names alone."""
    return replace(model, name=""), method.label


def _milliseconds(part: Part) -> Json:
    return {
        "modelled_ms": 1e3 * part.seconds,
        "modelled_device_ms": 1e3 * part.device,
        "modelled_host_ms": 1e3 * part.host,
    }
