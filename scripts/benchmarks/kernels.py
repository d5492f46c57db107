"""The compiled kernels on this CPU, against the same operations in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from lowrank.cuda import (
    blockwise,
    groups,
    int4,
    int4_update,
    rademacher,
    row_quantized,
    using_kernels,
)
from lowrank.cuda.noise import stochastic_bfloat16
from lowrank.optimizers import GaLoreAdamW8bit, LowRankOptimizer, QGaLoreAdamW8bit

from .results import Result
from .timing import milliseconds, paired_ratios, round_robin
from .workload import Workload, give

ENTRIES = 1 << 22
KERNELS = ("native", "torch")


def operations(numel: int) -> dict[str, Callable[[], Any]]:
    """Calls on `numel` entries."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(numel, generator=generator)
    half = wide.bfloat16()
    eight = blockwise.quantize_blockwise(wide, True)
    affine = groups.quantize_groups(half)
    packed = {name: int4.quantize_int4(half, name) for name in ("asymmetric", "nf4")}
    m, v = wide.clone(), wide.abs()
    m8, v8 = (blockwise.quantize_blockwise(t, s) for t, s in ((m, True), (v, False)))
    delta = torch.empty_like(wide)
    four = int4_update.encode(half, 64)
    matrix, codes = half.view(-1, 1024), affine[0].view(-1, 1024)
    rows = row_quantized.empty(len(matrix), 1024, 4, wide.device)
    roots, shaped = (torch.rand(len(matrix)), torch.rand(1024)), wide.view(-1, 1024)
    numbers = (0.9, 0.999, 1e-8, 1e-3, None)
    ops = torch.ops.lowrank
    return {
        "block-wise quantise": partial(blockwise.quantize_blockwise, wide, True, out=eight),
        "block-wise dequantise": partial(blockwise.dequantize_blockwise, *eight, True, out=wide),
        "INT8 quantise": partial(groups.quantize_groups, half, out=affine),
        "INT8 dequantise": partial(groups.dequantize_groups, *affine),
        "INT4 pack": partial(int4.quantize_int4, half, out=packed["asymmetric"]),
        "INT4 unpack": partial(int4.dequantize_int4, packed["asymmetric"], numel),
        "NF4 pack": partial(int4.quantize_int4, half, "nf4", out=packed["nf4"]),
        "stochastic bf16": partial(stochastic_bfloat16, wide, 7),
        "random signs": partial(rademacher, (numel,), 7),
        "8-bit Adam": lambda: ops.adam_8bit(
            [wide], [m8[0]], [m8[1]], [v8[0]], [v8[1]], [delta], *numbers
        ),
        "cautious rows": lambda: ops.cautious_rows(
            *(shaped, *rows, *roots, delta.view(-1, 1024)),
            *(4, True, 0.1, 1e-8, 0.5, 7, 0, 1024),
        ),
        "INT8 write-back": lambda: ops.write_back_int8(
            codes, *affine[1:], matrix, None, None, 256, 1.0, 1e-3, 7, 0
        ),
        "INT4 write-back": lambda: ops.write_back_int4(
            *four, matrix, None, None, *matrix.shape, 64, 1.0, 1e-3, 7, 0, 3
        ),
        "bf16 write-back": lambda: ops.write_back(matrix, matrix, None, None, 1.0, 1e-3, 7, 0),
    }


def steps(work: Workload) -> dict[str, Callable[[], Any]]:
    """Whole steps of the 8-bit optimizers, without refreshes."""
    made: dict[str, Callable[[], Any]] = {}
    (gradients,) = work.gradients(1)
    kinds: dict[str, type[LowRankOptimizer]] = {
        "GaLoreAdamW8bit step": GaLoreAdamW8bit,
        "QGaLoreAdamW8bit step": QGaLoreAdamW8bit,
    }
    for label, kind in kinds.items():
        parameters = work.parameters()
        give(parameters, gradients)
        group = {"params": parameters, "rank": work.rank, "update_proj_gap": 1_000_000_000}
        made[label] = kind([group], lr=1e-6).step
    return made


def measure_kernels(work: Workload, rounds: int, progress: Callable[[str], None]) -> Result:
    """Times each operation and step with the compiled kernels and without."""
    calls = operations(ENTRIES) | steps(work)

    def timed(call: Callable[[], Any], kernels: str, number: int) -> float:
        with using_kernels(kernels):
            return milliseconds(call)

    contestants: dict[str, Callable[[int], float]] = {}
    for name, call in calls.items():
        for kernels in KERNELS:
            contestants[f"{name}, {kernels}"] = partial(timed, call, kernels)
    for contestant in contestants.values():  # the first step fits the bases
        contestant(0)
    samples, canaries = round_robin(
        contestants, rounds, after_round=lambda done: progress(f"round {done} of {rounds}")
    )
    speeds: dict[str, dict[str, float]] = {}
    for name in calls:
        native, plain = (samples[f"{name}, {kernels}"] for kernels in KERNELS)
        speeds[f"{name}, native"] = {"times_as_fast": paired_ratios(plain, native).median}
    return Result(
        name="kernels",
        title=f"{ENTRIES} entries, compiled kernels and plain torch",
        labels={name: name for name in contestants},
        samples=samples,
        references=(),
        canaries=canaries,
        setting={"entries": ENTRIES, "rank": work.rank, "rounds": rounds},
        extra=speeds,
    )
