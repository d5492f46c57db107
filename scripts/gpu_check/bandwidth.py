"""Kernels that move bytes, against the device's copy rate and plain torch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowrank.cuda import (
    blockwise,
    gaussian,
    groups,
    int4,
    int4_update,
    rademacher,
    row_quantized,
    using_kernels,
)

from .record import NO_TIME, Record
from .section import Context

#: Share of the copy rate that the kernels marked as held should reach.
SHARE = 0.8

Call = Callable[[], Any]


@dataclass(frozen=True)
class Kernel:
    """One kernel at one size.

    Attributes:
        size: bytes that it has to move for an entry.
        prepare: makes its tensors; returns the call.
        held: whether it should reach `SHARE` of the copy rate.
    """

    size: float
    prepare: Callable[[], Call]
    held: bool = False


def kernels(numel: int, device: torch.device) -> dict[str, Kernel]:
    """All kernels, the most telling ones first.

    Args:
        numel: entries, a multiple of 2^10.
        device: where they are.
    """
    rows = numel // 1024
    ops = torch.ops.lowrank
    numbers = (0.9, 0.999, 1e-8, 1e-3, None)

    def wide() -> Tensor:
        return torch.randn(numel, device=device)

    def matrix() -> Tensor:
        return wide().bfloat16().view(rows, 1024)

    def zeros(dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.zeros(rows, 1024, dtype=dtype, device=device)

    def adam(dtype: torch.dtype, axis: int = -1) -> Call:
        grad, m, v, out = matrix(), zeros(dtype), zeros(dtype), zeros()
        norms: list[list[Tensor]] = [[], []]
        if axis >= 0:
            norms = [[torch.empty((rows, 1024)[1 - axis], device=device)] for _ in range(2)]
        return lambda: ops.adam([grad], [m], [v], [out], *norms, axis, *numbers)

    def adam_weights() -> Call:
        lists = [matrix()], [matrix()], [zeros(torch.float32)], [zeros(torch.float32)]
        return lambda: ops.adam_weights(*lists, *numbers[:4], 1.0, 1e-3, None)

    def adam_8bit() -> Call:
        grad, out = matrix(), zeros()
        m, m_scale = blockwise.quantize_blockwise(zeros(torch.float32), True)
        v, v_scale = blockwise.quantize_blockwise(zeros(torch.float32), False)
        return lambda: ops.adam_8bit([grad], [m], [m_scale], [v], [v_scale], [out], *numbers)

    def cautious() -> Call:
        codes, scales = row_quantized.empty(rows, 1024, 4, device)
        roots = torch.rand(rows, device=device), torch.rand(1024, device=device)
        fixed = matrix(), codes, scales, *roots, zeros(torch.float32)
        return lambda: ops.cautious_rows(*fixed, 4, True, 0.1, 1e-8, 0.5, 7, 0, 1024)

    def write_back(seed: int | None, residual: bool) -> Call:
        weight, delta = matrix(), matrix()
        grad = matrix() if residual else None
        factors = torch.rand(1, 1024, device=device) if residual else None
        return lambda: ops.write_back(weight, delta, grad, factors, 1.0, 1e-3, seed, 0)

    def write_back_int8() -> Call:
        codes, scales, zeros = groups.quantize_groups(matrix())
        delta = matrix()
        codes = codes.view(rows, 1024)
        return lambda: ops.write_back_int8(
            codes, scales, zeros, delta, None, None, 256, 1.0, 1e-3, 7, 0
        )

    def write_back_int4() -> Call:
        delta = matrix()
        stored = int4_update.encode(delta, 64)
        return lambda: ops.write_back_int4(
            *stored, delta, None, None, rows, 1024, 64, 1.0, 1e-3, 7, 0, 3
        )

    def pack(format: str, group: int) -> Call:
        x = wide().bfloat16()
        out = int4.quantize_int4(x, format, group)
        return lambda: int4.quantize_int4(x, format, group, out=out)

    def unpack(format: str, group: int) -> Call:
        stored = int4.quantize_int4(wide().bfloat16(), format, group)
        return lambda: int4.dequantize_int4(stored, numel, format, group)

    def affine(read: bool) -> Call:
        x = wide().bfloat16()
        out = groups.quantize_groups(x)
        if read:
            return lambda: groups.dequantize_groups(*out, out=x)
        return lambda: groups.quantize_groups(x, out=out)

    def by_blocks(read: bool) -> Call:
        x = wide()
        codes, absmax = blockwise.quantize_blockwise(x, True)
        if read:
            return lambda: blockwise.dequantize_blockwise(codes, absmax, True, out=x)
        return lambda: blockwise.quantize_blockwise(x, True, out=(codes, absmax))

    def stochastic() -> Call:
        x, out = wide(), torch.empty(numel, dtype=torch.bfloat16, device=device)
        return lambda: ops.stochastic_bfloat16(x, out, 7, 0)

    bf16, fp32 = torch.bfloat16, torch.float32
    return {
        "Adam, fp32 moments": Kernel(20.0, lambda: adam(fp32), held=True),
        "Adam and weight, fp32 moments": Kernel(22.0, adam_weights, held=True),
        "Adam, 8-bit moments": Kernel(8.0, adam_8bit, held=True),
        "cautious rows, 4-bit momentum": Kernel(7.06, cautious),
        "int8 requantise": Kernel(4.0, write_back_int8, held=True),
        "int4 update": Kernel(3.06, write_back_int4),
        "weight + stochastic bf16": Kernel(6.0, lambda: write_back(7, False), held=True),
        "int4 pack": Kernel(2.5, lambda: pack("asymmetric", 256), held=True),
        "int4 unpack": Kernel(2.5, lambda: unpack("asymmetric", 256), held=True),
        "NF4 unpack, groups of 64": Kernel(2.53, lambda: unpack("nf4", 64), held=True),
        "weight + residual": Kernel(8.0, lambda: write_back(None, True), held=True),
        "Adam, bf16 moments": Kernel(12.0, lambda: adam(bf16)),
        "Adam, norms of columns": Kernel(20.0, lambda: adam(fp32, 0)),
        "Adam, norms of rows": Kernel(20.0, lambda: adam(fp32, 1)),
        "blockwise quantise fp32": Kernel(5.0, lambda: by_blocks(False)),
        "blockwise dequantise fp32": Kernel(5.0, lambda: by_blocks(True)),
        "int8 quantise bf16": Kernel(3.0, lambda: affine(False)),
        "int8 dequantise bf16": Kernel(3.0, lambda: affine(True)),
        "int4 pack, mid-rise": Kernel(2.5, lambda: pack("midrise", 256)),
        "NF4 pack, groups of 64": Kernel(2.53, lambda: pack("nf4", 64)),
        "fp32 to stochastic bf16": Kernel(6.0, stochastic),
        "signs": Kernel(2.0, lambda: lambda: rademacher((numel,), 7, bf16, device)),
        "normal numbers": Kernel(2.0, lambda: lambda: gaussian((numel,), 7, bf16, device)),
    }


def run(record: Record, context: Context) -> None:
    """Times all of them compiled, and then as many in plain torch as there is time for."""
    clock, numel = context.clock, context.size.kernel_numel
    found = kernels(numel, context.device)

    def compiled(name: str, kernel: Kernel) -> None:
        with using_kernels("native"):
            timing = clock.measure(kernel.prepare(), most=context.size.samples, seconds=0.3)
        details = timing.as_dict() | {"ms": timing.median, "bytes_an_entry": kernel.size}
        note = f"{timing.median:.3f} ms, {kernel.size:g} bytes an entry"
        if context.rates is None:
            record.add("bytes", name, timing.median, "ms", note=note, details=details)
            return
        share = kernel.size * numel / timing.median / context.rates.copy
        aim = context.aim(SHARE if kernel.held else None)
        record.add(
            "bytes", name, share, "of copy", aim=aim, at_least=True, note=note, details=details
        )

    def plain(name: str, kernel: Kernel) -> None:
        with using_kernels("torch"):
            timing = clock.measure(kernel.prepare(), most=3, seconds=0.3, warm=1)
        own = next(row for row in record.rows if (row.group, row.name) == ("bytes", name))
        ratio = timing.median / own.details["ms"]
        record.add("torch", name, ratio, "x compiled", details={"ms": timing.median})

    record.attempt("host", lambda: _host(record, context), clean=False)
    for kind, work in (("compiled", compiled), ("plain torch", plain)):
        for name, kernel in found.items():
            label = f"{kind}: {name}"
            if clock.left() < 2:
                record.skip(label, NO_TIME)
            elif kind == "compiled" or record.value("bytes", name) is not None:
                record.attempt(label, functools.partial(work, name, kernel), clean=False)


def _host(record: Record, context: Context) -> None:
    """What a call costs the host, whose arguments walk through Python and ctypes."""
    for count in (1, 168):
        tensors = [
            [torch.zeros(8, 8, device=context.device) for _ in range(count)] for _ in range(4)
        ]
        grads, m, v, out = tensors

        def call(
            grads: list[Tensor] = grads,
            m: list[Tensor] = m,
            v: list[Tensor] = v,
            out: list[Tensor] = out,
        ) -> None:
            for _ in range(10):
                torch.ops.lowrank.adam(grads, m, v, out, [], [], -1, 0.9, 0.999, 1e-8, 1e-3, None)

        with using_kernels("native"):
            timing = context.clock.measure(call, most=10, seconds=0.2)
        record.add("host", f"adam on {count} small tensors", timing.median * 100, "us")
