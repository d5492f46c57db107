"""What compiled kernels must be in exact arithmetic: properties and formulas in fp64.

Beside `kernel_cases`, where they equal the references in plain torch: these say both are right.
"""

from __future__ import annotations

import math

import torch
from kernel_cases import DTYPES, Draw
from torch import Tensor

from lowrank.cuda import dynamic_map, native_quantize, native_update
from lowrank.cuda.int4 import nf4_values, unpack

#: Relative rounding of each type.
EPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


def poisoned(*shape: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Storage whose old content would be noticed."""
    fill = 0x5A if dtype == torch.uint8 else float("nan")
    return torch.full(shape, fill, dtype=dtype, device=like.device)


def by_group(x: Tensor, group: int) -> Tensor:
    """Rows of groups, the last one filled up with zeros."""
    padded = torch.nn.functional.pad(x.double().view(-1), (0, -x.numel() % group))
    return padded.view(-1, group)


def blockwise(d: Draw) -> None:
    """absmax is exact, codes are nearest, and what is read back is map[code] * absmax."""
    count, block, signed = d.integer(1, 4000), d.one(64, 256, 300), d.one(True, False)
    x = d.tensor(count, dtype=d.one(*DTYPES))
    x = x if signed else x.abs()
    codes = poisoned(count, like=x, dtype=torch.uint8)
    absmax = poisoned(-(-count // block), like=x, dtype=torch.float32)
    assert native_quantize.quantize_blockwise(x, codes, absmax, signed, block)
    rows = by_group(x, block)
    assert torch.equal(absmax.double(), rows.abs().amax(1))
    ratios = (rows / absmax.double().clamp(min=1e-300).unsqueeze(1)).view(-1)[:count]
    values = dynamic_map(signed, x.device).double()
    errors = (ratios.unsqueeze(1) - values).abs()
    if not signed:
        errors[:, 0] = math.inf  # never chosen
    chosen = errors.gather(1, codes.long().unsqueeze(1)).squeeze(1)
    assert bool((chosen <= errors.amin(1) + 1e-7 * ratios.abs()).all())

    out = poisoned(count, like=x, dtype=d.one(*DTYPES))
    assert native_quantize.dequantize_blockwise(codes, absmax, out, signed, block)
    scale = absmax.double().repeat_interleave(block)[:count]
    _near(out, values[codes.long()] * scale)


def affine(d: Draw) -> None:
    """Entries lie within half a step of what their codes stand for, or a whole one with noise."""
    count, group, levels = d.integer(1, 4000), d.one(64, 256, 300), d.one(15, 255)
    kind, seed = d.one(*DTYPES), d.one(None, d.seed())
    x = d.tensor(count, dtype=kind)
    codes = poisoned(count, like=x, dtype=torch.uint8)
    scales, zeros = (poisoned(-(-count // group), like=x, dtype=kind) for _ in range(2))
    assert native_quantize.quantize_groups(x, codes, scales, zeros, levels, group, seed, 0)
    assert int(codes.max()) <= levels
    scale, zero = (t.double().repeat_interleave(group)[:count] for t in (scales, zeros))
    exact = scale * (codes.double() - zero)
    # Zero points are whole numbers, so that the range may end half a step early.
    steps = 1.0 if seed is None else 1.5
    assert bool(((x.double() - exact).abs() <= steps * scale * (1 + 1e-5)).all())

    out = poisoned(count, like=x, dtype=kind)
    assert native_quantize.dequantize_groups(codes, scales, zeros, out, group)
    _near(out, exact)


def int4(d: Draw) -> None:
    """Symmetric codes are nearest, and what is read back is the formula."""
    count, group, format = d.integer(1, 4000), d.one(64, 256, 300), d.one("midrise", "nf4")
    kind = d.one(*DTYPES)
    x = d.tensor(count, dtype=kind)
    packed = poisoned(-(-count // 2), like=x, dtype=torch.uint8)
    scales = poisoned(-(-count // group), like=x, dtype=kind)
    assert native_quantize.quantize_int4(x, packed, scales, None, format, group)
    codes = unpack(packed, count)
    levels = torch.arange(16, device=x.device).double() - 7.5
    values = nf4_values(x.device).double() if format == "nf4" else levels
    scale = scales.double().repeat_interleave(group)[:count]
    units = x.double() / scale.clamp(min=1e-300)
    errors = (units.unsqueeze(1) - values).abs()
    chosen = errors.gather(1, codes.long().unsqueeze(1)).squeeze(1)
    live = scale > 0
    assert bool((chosen <= errors.amin(1) + 1e-5)[live].all())

    out = poisoned(count, like=x, dtype=kind)
    assert native_quantize.dequantize_int4(packed, scales, None, out, format, group)
    _near(out, values[codes.long()] * scale)


def rounding(d: Draw) -> None:
    """Stochastic rounding gives one of the two neighbours, and exact numbers stay."""
    x = d.tensor(d.integer(1, 4000))
    out = poisoned(x.numel(), like=x, dtype=torch.bfloat16)
    assert native_quantize.stochastic_bfloat16(x, out, d.seed(), d.integer(0, 1 << 40))
    spacing = torch.ldexp(torch.ones_like(x).double(), torch.frexp(x.double())[1] - 8)
    assert bool(((out.double() - x.double()).abs() < spacing).all())
    again = poisoned(x.numel(), like=x, dtype=torch.bfloat16)
    assert native_quantize.stochastic_bfloat16(out.float(), again, d.seed(), 0)
    assert torch.equal(out, again)


def adam(d: Draw) -> None:
    """Moments, deltas and norms against fp64."""
    rows, columns, axis = d.integer(1, 70), d.integer(1, 150), d.one(0, 1)
    grad, m, v = (d.tensor(rows, columns) for _ in range(3))
    v = v.square()
    g64, m64, v64 = grad.double(), m.double(), v.double()
    delta = poisoned(rows, columns, like=grad, dtype=torch.float32)
    norms = [poisoned((rows, columns)[1 - axis], like=grad, dtype=torch.float32) for _ in range(2)]
    lists = [grad], [m], [v], [delta], [norms[0]], [norms[1]]
    assert native_update.adam(*lists, axis, 0.9, 0.999, 1e-6, 0.3, None)
    m64 = 0.9 * m64 + 0.1 * g64
    v64 = 0.999 * v64 + 0.001 * g64.square()
    exact = 0.3 * m64 / (v64.sqrt() + 1e-6)
    pairs = ((m, m64), (v, v64), (delta, exact), (norms[0], g64.norm(dim=axis)))
    for ours, theirs in (*pairs, (norms[1], exact.norm(dim=axis))):
        size = float(theirs.abs().max())
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=2e-6 * size + 1e-30)


def write_back(d: Draw) -> None:
    """keep W - alpha D - f o G against fp64, to the rounding of the weight's type."""
    rows, columns, kind = d.integer(1, 60), d.integer(1, 300), d.one(*DTYPES)
    weight = d.tensor(rows, columns, dtype=kind)
    delta, grad = d.tensor(rows, columns), d.tensor(rows, columns)
    factors = d.tensor(d.one(1, rows), d.one(1, columns))
    parts = 0.9 * weight.double(), 0.1 * delta.double(), factors.double() * grad.double()
    assert native_update.write_back(weight, delta, grad, factors, 0.9, 0.1, None, 0)
    size = sum(part.abs() for part in parts)
    exact = parts[0] - parts[1] - parts[2]
    error = (weight.double() - exact).abs()
    held = exact.abs() < 0.99 * torch.finfo(kind).max  # fp16 overflows beyond
    assert bool((error <= size * (EPS[kind] + 1e-6) + 1e-7)[held].all())


def _near(out: Tensor, exact: Tensor) -> None:
    """To the rounding of the type of `out`, subnormal numbers of fp16 included."""
    error = (out.double() - exact).abs()
    held = exact.abs() < 0.99 * torch.finfo(out.dtype).max
    assert bool((error <= exact.abs() * EPS[out.dtype] + 1e-7)[held].all())


CASES = (blockwise, affine, int4, rounding, adam, write_back)
