"""Refitting all bases of a model: time, and what they capture of the best possible."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lowrank.optimizers.engine.geometry import Side
from lowrank.optimizers.projectors import decompositions

from .clock import Clock
from .record import Record
from .workload import Model, gradient, gradients

#: Seconds: (cold, warm).
AIMS = {"7b": (1.0, 0.25), "1b": (0.1, None)}


def side_of(shape: tuple[int, int]) -> Side:
    """The shorter side, as proj_type "std" chooses it."""
    return Side.RIGHT if shape[0] >= shape[1] else Side.LEFT


def refit(
    groups: dict[tuple[int, int], list[Tensor]],
    rank: int,
    mode: str,
    former: dict[tuple[int, int], list[Tensor]],
    rotate: bool,
) -> dict[tuple[int, int], list[Tensor]]:
    """New bases of all matrices, shape by shape, as the projector fits them."""
    made: dict[tuple[int, int], list[Tensor]] = {}
    for shape, grads in groups.items():
        scales = torch.stack([torch.linalg.vector_norm(g, torch.inf) for g in grads]).tolist()
        old: Sequence[Tensor | None] = former.get(shape) or [None] * len(grads)
        pairs = decompositions.bases(
            grads, scales, rank, side_of(shape), mode, old, seed=5, rotate=rotate
        )
        made[shape] = [pair[0] for pair in pairs]
    return made


def best_energy(grad: Tensor, rank: int) -> float:
    """The largest squared norm that any subspace of this rank captures, in fp64."""
    wide = grad.double() if grad.shape[0] <= grad.shape[1] else grad.double().mT
    values = torch.linalg.eigvalsh(wide @ wide.mT)
    return float(values[-rank:].sum())


def captured(grad: Tensor, basis: Tensor) -> float:
    """||P^T G||^2 in fp64, for the side that the basis fits."""
    wide, own = grad.double(), basis.double()
    low = own.mT @ wide if side_of((grad.shape[0], grad.shape[1])) is Side.LEFT else wide @ own
    return float(low.square().sum())


def defect(basis: Tensor) -> float:
    """Largest entry of P^T P - I."""
    own = basis.double()
    eye = torch.eye(own.shape[1], dtype=own.dtype, device=own.device)
    return float((own.mT @ own - eye).abs().max())


def run(record: Record, clock: Clock, name: str, model: Model, *, baselines: bool) -> None:
    """Times cold and warm refreshes of a model, and checks the bases.

    Args:
        record: takes the rows.
        clock: of the device.
        name: key of the aims.
        model: whose matrices.
        baselines: also torch's own decompositions, of one matrix of each shape.
    """
    section = f"refresh {name}, rank {model.rank}"
    like = torch.empty(0, dtype=torch.bfloat16, device=clock.device)
    groups: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
    for grad in gradients(model, like):
        groups[(grad.shape[0], grad.shape[1])].append(grad)
    best = {shape: best_energy(grads[0], model.rank) for shape, grads in groups.items()}
    cold_aim, warm_aim = AIMS.get(name, (None, None))

    # Bases of gradients that share two thirds with the present ones, as those of former steps do.
    drifted = {
        shape: [0.7 * g + 0.3 * gradient(shape, 1000 + i, like) for i, g in enumerate(grads)]
        for shape, grads in groups.items()
    }
    former = refit(drifted, model.rank, "randomized", {}, rotate=False)
    del drifted

    for label, mode, rotate, aim in (
        ("cold", "randomized", False, cold_aim),
        ("cold, rotated to singular vectors", "randomized", True, None),
        ("warm", "warm", False, warm_aim),
        ("warm, rotated to singular vectors", "warm", True, None),
    ):
        if clock.left() < 60:
            record.skipped.append(f"{section}: {label}")
            continue
        made: dict[tuple[int, int], list[Tensor]] = {}

        def call(
            mode: str = mode,
            rotate: bool = rotate,
            made: dict[tuple[int, int], list[Tensor]] = made,
        ) -> None:
            made.clear()  # of the former call, before its successors are made
            made.update(refit(groups, model.rank, mode, former if mode == "warm" else {}, rotate))

        timing = clock.measure(call, most=5, seconds=8.0, warm=1)
        note = f"{timing.low / 1e3:.3g} to {timing.high / 1e3:.3g} s, {timing.samples} times"
        record.add(section, label, timing.median / 1e3, "s", aim=aim, note=note)
        shares = [captured(groups[s][0], made[s][0]) / best[s] for s in groups]
        worst = max(defect(basis) for bases in made.values() for basis in bases[:2])
        record.add(
            section, f"{label}: energy of the optimum", min(shares), "", aim=0.999, at_least=True
        )
        record.add(section, f"{label}: max |P^T P - I|", worst, "", aim=1e-5)
    if baselines:
        _baselines(record, clock, section, groups, model.rank)


def _baselines(
    record: Record,
    clock: Clock,
    section: str,
    groups: dict[tuple[int, int], list[Tensor]],
    rank: int,
) -> None:
    """One matrix of each shape, times how many there are."""
    methods: dict[str, Callable[[Tensor], Any]] = {
        "torch.svd_lowrank(niter=2)": lambda g: torch.svd_lowrank(
            g.float(), q=min(rank + 16, *g.shape), niter=2
        ),
        "torch.linalg.eigh of the Gram": lambda g: torch.linalg.eigh(_gram(g.float())),
        "torch.linalg.svd": lambda g: torch.linalg.svd(g.float(), full_matrices=False),
    }
    for label, method in methods.items():
        total = 0.0
        for shape, grads in groups.items():
            if clock.left() < 60:
                record.skipped.append(f"{section}: {label}")
                return
            # One call of torch.linalg.svd takes seconds.
            calls = {"most": 1, "warm": 0} if label.endswith("svd") else {"most": 2, "warm": 1}
            call = functools.partial(method, grads[0])
            timing = clock.measure(call, seconds=1.0, **calls)
            total += timing.median * len(groups[shape])
        note = "one matrix of each shape, times their number"
        record.add(section, label, total / 1e3, "s", note=note)


def _gram(grad: Tensor) -> Tensor:
    return grad @ grad.mT if grad.shape[0] <= grad.shape[1] else grad.mT @ grad
