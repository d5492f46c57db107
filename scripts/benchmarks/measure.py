"""The benchmarks: steps between refreshes, refreshes, COAP's update, factored layers, kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import torch

from lowrank.optimizers import ApolloAdamW, CoapAdamW, FiraAdamW, OnlineSubspaceAdamW

from . import layers as factored
from .contestants import (
    FIRA,
    GALORE_TORCH,
    Contestant,
    fira_package,
    fused_adamw,
    galore_torch,
    gemm_floor,
    ours,
)
from .correlation import by_autograd, in_closed_form
from .kernels import measure_kernels
from .results import Result
from .timing import milliseconds, paired_ratios, round_robin
from .workload import Workload

OURS = "galore"
Progress = Callable[[str], None]


def step(work: Workload, rounds: int, progress: Progress) -> Result:
    """Times steps on which no basis is refreshed.

    Args:
        work: the matrices.
        rounds: timed steps of each contestant.
        progress: told what is going on.
    """
    entrants = [
        gemm_floor(work),
        fused_adamw(work),
        ours(work, OURS, "GaLoreAdamW"),
        ours(work, "galore_bf16", "GaLoreAdamW, bf16 GEMMs", projection_dtype="bfloat16"),
        galore_torch(work),
        ours(work, "fira_ours", "FiraAdamW", optimizer_class=FiraAdamW),
        fira_package(work),
        ours(work, "apollo", "ApolloAdamW", optimizer_class=ApolloAdamW),
        ours(work, "online", "OnlineSubspaceAdamW", optimizer_class=OnlineSubspaceAdamW),
        ours(work, "coap", "CoapAdamW", optimizer_class=CoapAdamW),
    ]
    contestants = [entrant for entrant in entrants if entrant is not None]
    (gradients,) = work.gradients(1)
    for contestant in contestants:
        progress(f"first refresh and warm-up: {contestant.label}")
        contestant.take(gradients)
        for _ in range(4):
            contestant.step()

    def timed(contestant: Contestant) -> Callable[[int], float]:
        return lambda _: milliseconds(contestant.step)

    samples, canaries = round_robin(
        {contestant.name: timed(contestant) for contestant in contestants},
        rounds,
        after_round=lambda number: progress(f"round {number + 1} of {rounds}"),
    )
    return Result(
        name="step",
        title=f"One optimizer step, {_describe(work)}",
        labels={contestant.name: contestant.label for contestant in contestants},
        samples=samples,
        references=("gemm_floor", OURS, GALORE_TORCH, FIRA),
        canaries=canaries,
        setting=_setting(work, rounds),
    )


def refresh(work: Workload, rounds: int, progress: Progress) -> Result:
    """Times refreshes of all bases: a step that refreshes minus the plain step after it.

    Every contestant refreshes on each second step. Gradients of two batches alternate, so that the
    warm-started mode starts from another batch's basis.

    Args:
        work: the matrices.
        rounds: timed refreshes of each contestant.
        progress: told what is going on.
    """
    modes = ("svd", "eigh", "randomized", "warm")
    entrants = [
        galore_torch(work, gap=2),
        *(ours(work, mode, f"refresh={mode}", gap=2, refresh=mode) for mode in modes),
    ]
    contestants = [entrant for entrant in entrants if entrant is not None]
    batches = work.gradients(2)
    for contestant in contestants:
        progress(f"first refresh: {contestant.label}")
        contestant.take(batches[1])
        contestant.step()
        contestant.step()

    def timed(contestant: Contestant) -> Callable[[int], float]:
        def call(number: int) -> float:
            contestant.take(batches[number % len(batches)])
            refreshing = milliseconds(contestant.step)
            return refreshing - milliseconds(contestant.step)

        return call

    samples, canaries = round_robin(
        {contestant.name: timed(contestant) for contestant in contestants},
        rounds,
        after_round=lambda number: progress(f"round {number + 1} of {rounds}"),
    )
    energies: dict[str, dict[str, float]] = {}
    for contestant in contestants:
        progress(f"captured energy: {contestant.label}")
        contestant.take(batches[rounds % len(batches)])
        if contestant.energy is not None:
            energies[contestant.name] = {"captured_energy": contestant.energy()}
    return Result(
        name="refresh",
        title=f"A refresh of all bases, {_describe(work)}",
        labels={contestant.name: contestant.label for contestant in contestants},
        samples=samples,
        references=(GALORE_TORCH,),
        canaries=canaries,
        setting=_setting(work, rounds),
        extra=energies,
    )


def coap(work: Workload, rounds: int, progress: Progress) -> Result:
    """Times COAP's update of all bases between re-projections: closed form against autograd.

    Args:
        work: the matrices.
        rounds: timed updates of each contestant.
        progress: told what is going on.
    """
    (gradients,) = work.gradients(1)
    contestants = {
        "autograd": by_autograd(work, gradients),
        "closed_form": in_closed_form(work, gradients),
    }
    for call in contestants.values():
        call()

    def timed(call: Callable[[], None]) -> Callable[[int], float]:
        return lambda _: milliseconds(call)

    samples, canaries = round_robin(
        {name: timed(call) for name, call in contestants.items()},
        rounds,
        after_round=lambda number: progress(f"round {number + 1} of {rounds}"),
    )
    return Result(
        name="coap",
        title=f"COAP's update of all bases, {_describe(work)}",
        labels={"autograd": "autograd of the loss", "closed_form": "CorrelationProjector"},
        samples=samples,
        references=("autograd",),
        canaries=canaries,
        setting=_setting(work, rounds),
    )


def layers(work: Workload, rounds: int, progress: Progress) -> Result:
    """Times a step of factored layers with forward and backward, one layer of each shape.

    Args:
        work: the shapes and the rank.
        rounds: timed steps of each contestant.
        progress: told what is going on.
    """
    made = factored.contestants(work)

    def timed(call: Callable[[], None]) -> Callable[[int], float]:
        return lambda _: milliseconds(call)

    samples, canaries = round_robin(
        {name: timed(entry.call) for name, entry in made.items()},
        rounds,
        after_round=lambda number: progress(f"round {number + 1} of {rounds}"),
    )
    extra = {name: {"KiB": entry.kib} for name, entry in made.items()}
    for name in factored.OPTIONS:
        ratio = paired_ratios(samples[name], samples[f"{name} autograd"]).median
        extra[name]["x_autograd"] = ratio
    return Result(
        name="layers",
        title=f"Forward, backward and update of {factored.TOKENS} tokens, a layer of each shape, "
        f"rank {work.rank}, fp32, {torch.get_num_threads()} threads",
        labels={name: entry.label for name, entry in made.items()},
        samples=samples,
        references=("dense",),
        canaries=canaries,
        setting=_setting(work, rounds) | {"tokens": factored.TOKENS},
        extra=extra,
    )


BENCHMARKS = {
    "step": step,
    "refresh": refresh,
    "coap": coap,
    "layers": layers,
    "kernels": measure_kernels,
}
#: Rounds when none are asked for: a refresh takes far longer than a step.
ROUNDS = {"step": 41, "refresh": 7, "coap": 21, "layers": 11, "kernels": 11}


def _describe(work: Workload) -> str:
    kinds = " + ".join(f"{count} of {m}x{n}" for count, m, n in work.shapes)
    return f"{kinds}, rank {work.rank}, fp32, {torch.get_num_threads()} threads"


def _setting(work: Workload, rounds: int) -> dict[str, object]:
    return asdict(work) | {"dtype": "float32", "rounds": rounds}
