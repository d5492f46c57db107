"""Refitting all bases of a model: time, and what they capture of the best possible.

Through the optimizer, as people use it: with a gap of one step every step refreshes, and the hook
of refreshes tells seconds and captured energy of each matrix.
"""

from __future__ import annotations

import functools
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.optimizers import RefreshEvent, build

from .files import Json
from .record import NO_TIME, Record
from .section import Context
from .workload import Matrices, Model, fill, gradient, made

#: Seconds (cold, warm) on a device with `REFERENCE` bf16 operations a second.
AIMS = {"60m": (0.010, None), "1b": (0.1, None), "7b": (1.0, 0.25)}
REFERENCE = 790e12
#: Of the energy that any subspace of the rank captures: below is wrong; the aim.
WRONG, AIM = 0.99, 0.999
#: Largest entry of P^T P - I of bases that are stored in bf16.
DEFECT = 0.05
#: Exact decompositions: how many matrices of a shape are decomposed, the rest is counted in.
COPIES = 2
#: Share of the time left that a baseline may be expected to take.
SHARE = 0.3


@dataclass(frozen=True)
class Mode:
    """One way to refresh.

    Attributes:
        label: for people.
        refresh: as the option says.
        rotate: to singular vectors; None where there is no choice.
        drifts: each refresh sees a gradient that is for a third new, as in training.
        whole: all matrices of the model; else `COPIES` of each shape.
    """

    label: str
    refresh: str
    rotate: bool | None
    drifts: bool = False
    whole: bool = True

    def options(self) -> Json:
        """Of `build`."""
        return {"refresh": self.refresh} | ({} if self.rotate is None else {"rotate": self.rotate})


RANDOMIZED = Mode("randomized", "randomized", True)
WARM = Mode("warm", "warm", True, drifts=True)
UNROTATED = Mode("randomized, unrotated", "randomized", False)
WARM_UNROTATED = Mode("warm, unrotated", "warm", False, drifts=True)
EIGH = Mode("eigh", "eigh", None, whole=False)
SVD = Mode("svd", "svd", None, whole=False)


def run(record: Record, context: Context) -> None:
    """Iterative modes of all sizes first, then exact ones, then torch's own decomposition."""
    refresh = Refresh(record, context)
    for label, work in refresh.plan():
        record.attempt(label, work)
    refresh.ratios()


class Refresh:
    """The measurements of this section, and what they know of each other."""

    def __init__(self, record: Record, context: Context) -> None:
        self._record, self._context = record, context
        self._best: dict[tuple[str, tuple[int, int], bool], float] = {}

    def plan(self) -> list[tuple[str, Callable[[], None]]]:
        """Labels and what to do, in the order of their worth."""
        models = self._context.size.models
        chosen: list[tuple[str, Callable[[], None]]] = []

        def add(name: str, mode: Mode) -> None:
            call = functools.partial(self._mode, models[name], mode)
            chosen.append((f"{name} {mode.label}", call))

        for name in ("1b", "60m", "7b"):
            add(name, RANDOMIZED)
            add(name, WARM)
        for name in ("60m", "1b"):
            add(name, EIGH)
            baseline = functools.partial(self._baseline, models[name])
            chosen.append((f"{name} torch.linalg.svd", baseline))
        for name in ("1b", "7b"):
            add(name, UNROTATED)
            add(name, WARM_UNROTATED)
        add("60m", SVD)
        add("7b", EIGH)
        chosen.append(("7b torch.linalg.svd", functools.partial(self._baseline, models["7b"])))
        return chosen

    # Modes

    def _mode(self, model: Model, mode: Mode) -> None:
        context, record = self._context, self._record
        label = f"{model.name} {mode.label}"
        if not self._affords(label, self._expected(model, mode)):
            return
        copies = None if mode.whole else COPIES
        matrices = made(model, context.device, ends=False, copies=copies)
        fits = Fits(model, matrices, mode)
        seconds = [fits.refit(context)]  # the first also loads and tunes what it calls
        end = time.monotonic() + 3.0
        while len(seconds) < 5 and time.monotonic() < end and context.clock.left() > 5.0:
            seconds.append(fits.refit(context))
        warm = seconds[1:] or seconds
        measured, count = len(matrices.projected()), len(model.projected())
        scaled = "" if measured == count else f"; scaled from {measured} of {count} matrices"
        total = statistics.median(warm)
        energy, defect = self._quality(model, fits)
        aim = None
        if mode in (RANDOMIZED, WARM) and context.rates is not None:
            aim = AIMS[model.name][int(mode is WARM)]
            aim = aim and context.aim(aim * REFERENCE / (1e3 * context.rates.bf16))
        note = f"{min(warm):.3g} to {max(warm):.3g} s, {len(warm)} times{scaled}"
        details = {"seconds": seconds, "measured": measured, "energy": energy, "defect": defect}
        record.add(model.name, mode.label, total, "s", aim=aim, note=note, details=details)
        name = f"{label}: energy of the optimum"
        held = [share for share in energy.values() if share is not None]
        if held:
            # Without a rotation the last directions of a basis are not those of most energy.
            least = None if mode.rotate is False else AIM
            record.add(model.name, f"{mode.label}: energy", min(held), "", aim=least, at_least=True)
            record.check(name, min(held) >= WRONG, f"{min(held):.5f}, at least {WRONG}")
        passed = defect is None or defect <= DEFECT
        record.check(f"{label}: P^T P = I", passed, f"off by {defect}, at most {DEFECT}")

    def _expected(self, model: Model, mode: Mode) -> float:
        """Seconds that a mode may take, from what it took on a smaller model; 0 if unknown."""
        if mode.whole:
            return 0.0
        smaller = {"1b": "60m", "7b": "1b"}.get(model.name, "")
        before = [
            row for row in self._record.rows if (row.group, row.name) == (smaller, mode.label)
        ]
        if not before:
            return 0.0
        small = self._context.size.models[smaller]
        one: float = min(before[-1].details["seconds"]) / len(small.projected())
        # Cubic in the shorter side; there are at least two refits.
        growth = (model.hidden / small.hidden) ** 3
        return 2 * one * growth * COPIES * len(model.shapes())

    def _affords(self, label: str, expected: float) -> bool:
        left = self._context.clock.left()
        if left < 3.0:
            self._record.skip(label, NO_TIME)
        elif expected > SHARE * left:
            self._record.skip(label, f"{NO_TIME} for {expected:.0f} s")
        else:
            return True
        return False

    def _quality(self, model: Model, fits: Fits) -> tuple[dict[str, float | None], float | None]:
        """Energy over the optimum of a matrix of each shape, and the bases' worst defect."""
        energy: dict[str, float | None] = {}
        for shape, (weight, share) in fits.captured().items():
            key = "x".join(map(str, shape))
            if self._context.clock.left() < 5.0:
                energy[key] = None
                continue
            assert weight.grad is not None
            if fits.mode.drifts:  # another gradient than that of the other modes
                best = best_share(weight.grad, model.rank)
            else:
                known = (model.name, shape, fits.mode.whole)  # fewer matrices are others
                if known not in self._best:
                    self._best[known] = best_share(weight.grad, model.rank)
                best = self._best[known]
            energy[key] = share / best
        return energy, fits.defect()

    # Torch's own

    def _baseline(self, model: Model) -> None:
        """One matrix of each shape, times how many there are."""
        context, record, name = self._context, self._record, "torch.linalg.svd"
        label = f"{model.name} {name}"
        total = 0.0
        single: dict[str, float] = {}
        counts: Counter[tuple[int, int]] = Counter()
        for (m, n), count in model.shapes().items():
            counts[min(m, n), max(m, n)] += count  # a transposed matrix takes as long
        for shape, count in sorted(counts.items()):
            known = self._singles() | single
            expected = predicted(shape, known)
            if not self._affords(f"{label} of {shape}", expected):
                return
            like = torch.empty(0, dtype=torch.bfloat16, device=context.device)
            grad = gradient(shape, 1, like).float()
            # The first call also loads the solver; a second one of a large matrix is too dear.
            warm = int(not known)
            timing = context.clock.measure(
                functools.partial(torch.linalg.svd, grad, full_matrices=False), most=1, warm=warm
            )
            single["x".join(map(str, shape))] = timing.median / 1e3
            total += count * timing.median / 1e3
        note = f"scaled from {len(single)} of {len(model.projected())} matrices, one of each shape"
        record.add(model.name, name, total, "s", note=note, details={"single": single})

    def _singles(self) -> dict[str, float]:
        """Seconds of single SVDs that were measured, by shape."""
        found: dict[str, float] = {}
        for row in self._record.rows:
            found |= row.details.get("single", {})
        return found

    def ratios(self) -> None:
        """Every mode beside torch.linalg.svd."""
        for name in self._context.size.models:
            whole = self._record.value(name, "torch.linalg.svd")
            for mode in (RANDOMIZED, WARM, UNROTATED, WARM_UNROTATED, EIGH, SVD):
                own = self._record.value(name, mode.label)
                label = f"{mode.label}: share of torch.linalg.svd"
                if whole and own and self._record.value(name, label) is None:
                    self._record.add(name, label, own / whole, "", note="the SVD's time is scaled")


class Fits:
    """An optimizer that refreshes at every step."""

    def __init__(self, model: Model, matrices: Matrices, mode: Mode) -> None:
        self.mode = mode
        self._model, self._matrices = model, matrices
        options = {"rank": model.rank, "update_proj_gap": 1, **mode.options()}
        self._optimizer = build("galore_adamw", matrices, lr=1e-6, **options)
        self._optimizer.register_refresh_hook(self._heard)
        self._events: list[RefreshEvent] = []
        self._names = {name: weight for name, weight in matrices.named_parameters()}
        self._steps = 0
        fill(matrices)

    def _heard(self, event: RefreshEvent) -> None:
        self._events.append(event)

    def refit(self, context: Context) -> float:
        """Seconds of one refresh of all matrices of the model.

        Raises:
            RuntimeError: a matrix was not refitted.
        """
        if self.mode.drifts and self._steps:
            for offset, weight in enumerate(self._matrices.projected()):
                assert weight.grad is not None
                shape = (weight.shape[0], weight.shape[1])
                new = gradient(shape, 1000 * self._steps + offset, weight)
                weight.grad.mul_(0.7).add_(new, alpha=0.3)
        self._steps += 1
        self._events.clear()
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*former basis is kept")
            self._optimizer.step()
        context.clock.synchronize()
        count = len(self._matrices.projected())
        if len(self._events) != count:
            raise RuntimeError(f"{len(self._events)} of {count} matrices were refitted")
        return self._whole()

    def _whole(self) -> float:
        """Seconds of the whole model: those of each shape's matrices, times how many it has."""
        total = 0.0
        for shape, count in self._model.shapes().items():
            spent = [event.seconds for event in self._events if event.shape == shape]
            total += count * sum(spent) / len(spent)
        return total

    def captured(self) -> dict[tuple[int, int], tuple[nn.Parameter, float]]:
        """A matrix of each shape, and the share of its gradient's energy that its basis keeps."""
        found: dict[tuple[int, int], tuple[nn.Parameter, float]] = {}
        for event in self._events:
            if event.shape not in found and event.name in self._names:
                found[event.shape] = (self._names[event.name], event.captured_energy)
        return found

    def defect(self) -> float | None:
        """Largest entry of P^T P - I, of a matrix of each shape; None without a dense basis."""
        worst: float | None = None
        for weight, _ in self.captured().values():
            state: dict[str, Any] = self._optimizer.state[weight]
            basis = state.get("basis")
            if isinstance(basis, Tensor) and basis.dim() == 2 and basis.is_floating_point():
                own = basis.double()
                eye = torch.eye(own.shape[1], dtype=own.dtype, device=own.device)
                worst = max(worst or 0.0, float((own.mT @ own - eye).abs().max()))
        return worst


def best_share(grad: Tensor, rank: int) -> float:
    """The largest share of a gradient's energy that a subspace of this rank keeps, in fp64."""
    wide = grad.double()
    wide = wide if wide.shape[0] <= wide.shape[1] else wide.mT
    values = torch.linalg.eigvalsh(wide @ wide.mT)
    return float(values[-rank:].sum() / values.sum())


def predicted(shape: tuple[int, int], known: dict[str, float]) -> float:
    """Seconds of an SVD, from the largest of those that are known; 0 if there is none."""
    if not known:
        return 0.0

    def work(m: int, n: int) -> float:
        return float(min(m, n) ** 2 * max(m, n))

    sizes = {key: work(*map(int, key.split("x"))) for key in known}
    largest = max(sizes, key=lambda key: sizes[key])
    return known[largest] * work(*shape) / sizes[largest]
