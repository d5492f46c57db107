"""What compiled kernels must equal: random inputs for each operation, beside its reference.

A case draws sizes and types, computes with both (`kernel_runs`), and compares.
"""

from __future__ import annotations

from typing import Any

import torch
from draws import Draw
from kernel_runs import exactly, run
from torch import Tensor

from lowrank.cuda import int4_update
from lowrank.cuda.row_quantized import blocks, code_bytes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def blockwise_quantize(d: Draw) -> None:
    """Codes and scales are the same to the bit."""
    count, block = d.integer(1, 9000), d.one(31, 64, 256, 300, 4096)
    x = d.tensor(count, dtype=d.one(*DTYPES))
    codes = torch.empty(count, dtype=torch.uint8, device=d.device)
    absmax = torch.empty(-(-count // block), device=d.device)
    exactly(run(d, "quantize_blockwise", [x, codes, absmax, d.one(True, False), block], [1, 2]))


def blockwise_dequantize(d: Draw) -> None:
    """Entries are the same to the bit."""
    count, block = d.integer(1, 9000), d.one(31, 64, 256, 300)
    codes = d.integers(count, high=256)
    absmax = d.tensor(-(-count // block)).abs()
    out = torch.empty(count, dtype=d.one(*DTYPES), device=d.device)
    exactly(run(d, "dequantize_blockwise", [codes, absmax, out, d.one(True, False), block], [2]))


def groups_quantize(d: Draw) -> None:
    """Codes, scales and zero points are the same to the bit, noise included."""
    count, group = d.integer(1, 9000), d.one(31, 64, 256, 300)
    kind = d.one(*DTYPES)
    x = d.tensor(count, dtype=kind)
    codes = torch.empty(count, dtype=torch.uint8, device=d.device)
    scales = torch.empty(-(-count // group), dtype=d.one(torch.float32, kind), device=d.device)
    seed = d.one(None, d.seed())
    arguments = [x, codes, scales, scales, d.one(15, 255), group, seed, d.integer(0, 1 << 40)]
    exactly(run(d, "quantize_groups", arguments, [1, 2, 3]))


def groups_dequantize(d: Draw) -> None:
    """Entries are the same to the bit."""
    count, group = d.integer(1, 9000), d.one(31, 64, 256, 300)
    kind = d.one(*DTYPES)
    scales = d.tensor(-(-count // group), dtype=kind).abs()
    zeros = d.integers(len(scales), high=256).to(kind)
    out = torch.empty(count, dtype=d.one(torch.float32, kind), device=d.device)
    arguments = [d.integers(count, high=256), scales, zeros, out, group]
    exactly(run(d, "dequantize_groups", arguments, [3]))


def groups_dequantize_list(d: Draw) -> None:
    """Entries of each tensor of a list are the same to the bit."""
    counts = [d.integer(1, 3000) for _ in range(d.one(1, 2, 20))]
    kind, group = d.one(*DTYPES), d.one(31, 64, 256, 300)
    scales = [d.tensor(-(-count // group), dtype=kind).abs() for count in counts]
    zeros = [d.integers(len(own), high=256).to(kind) for own in scales]
    codes = [d.integers(count, high=256) for count in counts]
    out_kind = d.one(torch.float32, kind)
    outs = [torch.empty(count, dtype=out_kind, device=d.device) for count in counts]
    exactly(run(d, "dequantize_groups_list", [codes, scales, zeros, outs, group], [3]))


def int4_quantize(d: Draw) -> None:
    """Packed codes and parameters are the same to the bit in all formats."""
    count, group = d.integer(1, 9000), d.one(30, 64, 128, 256, 300)
    kind, format = d.one(*DTYPES), d.one("asymmetric", "midrise", "nf4")
    x = d.tensor(count, dtype=kind)
    codes = torch.empty(-(-count // 2), dtype=torch.uint8, device=d.device)
    scales = torch.empty(-(-count // group), dtype=d.one(torch.float32, kind), device=d.device)
    zeros = scales if format == "asymmetric" else None
    exactly(run(d, "quantize_int4", [x, codes, scales, zeros, format, group], [1, 2, 3]))


def int4_dequantize(d: Draw) -> None:
    """Entries are the same to the bit in all formats."""
    count, group = d.integer(1, 9000), d.one(30, 64, 128, 256, 300)
    kind, format = d.one(*DTYPES), d.one("asymmetric", "midrise", "nf4")
    codes = d.integers(-(-count // 2), high=256)
    scales = d.tensor(-(-count // group), dtype=kind).abs()
    zeros = d.integers(len(scales), high=16).to(kind) if format == "asymmetric" else None
    out = torch.empty(count, dtype=d.one(torch.float32, kind), device=d.device)
    exactly(run(d, "dequantize_int4", [codes, scales, zeros, out, format, group], [3]))


def int4_dequantize_list(d: Draw) -> None:
    """The same in four bits, in all formats."""
    counts = [d.integer(1, 3000) for _ in range(d.one(1, 2, 20))]
    kind, group = d.one(*DTYPES), d.one(30, 64, 128, 256, 300)
    format = d.one("asymmetric", "midrise", "nf4")
    scales = [d.tensor(-(-count // group), dtype=kind).abs() for count in counts]
    zeros = [d.integers(len(own), high=16).to(kind) for own in scales]
    codes = [d.integers(-(-count // 2), high=256) for count in counts]
    out_kind = d.one(torch.float32, kind)
    outs = [torch.empty(count, dtype=out_kind, device=d.device) for count in counts]
    arguments = [codes, scales, zeros if format == "asymmetric" else [], outs, format, group]
    exactly(run(d, "dequantize_int4_list", arguments, [3]))


def rademacher(d: Draw) -> None:
    """The same signs."""
    out = torch.empty(d.integer(1, 9000), dtype=d.one(*DTYPES), device=d.device)
    exactly(run(d, "rademacher", [out, d.seed()], [0]))


def gaussian(d: Draw) -> None:
    """The same numbers from every first position, with the seed as a number and in a tensor."""
    out = torch.empty(d.integer(0, 9000), dtype=d.one(*DTYPES), device=d.device)
    given = d.one(None, torch.tensor(d.seed(), device=d.device))
    exactly(run(d, "gaussian", [out, d.seed(), given, d.integer(0, 1 << 40)], [0]))


def gaussian_list(d: Draw) -> None:
    """The same numbers for each tensor of a list, scaled, with seeds of both kinds."""
    kind, count = d.one(*DTYPES), d.one(1, 2, 20)
    outs = [torch.empty(d.integer(0, 9000), dtype=kind, device=d.device) for _ in range(count)]
    seeds = [d.seed() for _ in outs]
    given = d.one([], [torch.tensor(seed, device=d.device) for seed in seeds])
    arguments = [outs, [] if given else seeds, given, d.one(1.0, 128**-0.5)]
    exactly(run(d, "gaussian_list", arguments, [0]))


def stochastic_bfloat16(d: Draw) -> None:
    """The same bits, infinities and NaN included."""
    x = d.tensor(d.integer(4, 9000))
    x[0], x[1], x[2] = float("inf"), float("nan"), -float("inf")
    out = torch.empty(len(x), dtype=torch.bfloat16, device=d.device)
    arguments = [x, out, d.seed(), d.integer(0, 1 << 40), _device_seed(d)]
    exactly(run(d, "stochastic_bfloat16", arguments, [1]))


def _device_seed(d: Draw) -> Tensor | None:
    given: Tensor | None = d.one(None, torch.tensor(d.seed(), device=d.device))
    return given


def _device_sizes(d: Draw) -> Tensor | None:
    """A decay factor and a step size that replace the numbers, or none."""
    sizes: Tensor | None = d.one(None, torch.tensor([0.8, 0.3], device=d.device))
    return sizes


def step_seeds(d: Draw) -> None:
    """The same seeds for lists that need one launch and several."""
    count = d.one(1, 3, 20, 480)
    steps = list(d.integers(count, high=256).float().mul_(65_521.0).unbind(0))
    states = [d.seed(), *range(-7, count - 8)]
    seeds = torch.empty(count, dtype=torch.int64, device=d.device)
    exactly(run(d, "step_seeds", [steps, states, d.seed(), seeds], [3]))


def _close(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """To a few units in the last place: the reference's order of operations is torch's."""
    for ours, theirs in pairs:
        tolerance = 2e-2 if ours.dtype == torch.bfloat16 else 2e-6
        scale = float(theirs.abs().max()) if theirs.numel() else 0.0
        torch.testing.assert_close(
            ours.float(), theirs.float(), rtol=tolerance, atol=1e-6 * scale + 1e-30
        )


def _adam_types(d: Draw) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
    single, half = torch.float32, torch.bfloat16
    chosen: tuple[torch.dtype, torch.dtype, torch.dtype] = d.one(
        (single, single, single),
        (half, single, single),
        (half, single, half),
        (half, half, single),
        (half, half, half),
    )
    return chosen


def adam(d: Draw) -> None:
    """Moments, deltas and norms are close, for lists that need several launches."""
    grad_type, state_type, delta_type = _adam_types(d)
    shapes = [(d.integer(1, 70), d.integer(1, 150)) for _ in range(d.one(1, 2, 30))]
    axis = d.one(-1, 0, 1)
    grads = [d.tensor(*shape, dtype=grad_type) for shape in shapes]
    m = [d.tensor(*shape, dtype=state_type) for shape in shapes]
    v = [d.tensor(*shape, dtype=state_type).square() for shape in shapes]
    deltas = [torch.zeros_like(grad, dtype=delta_type) for grad in grads]
    norms = [torch.zeros(shape[1 - axis], device=d.device) for shape in shapes if axis >= 0]
    sizes = d.one(None, d.tensor(len(grads), 2).abs() + 1e-6)
    arguments = [grads, m, v, deltas, norms, norms, axis, 0.9, 0.999, 1e-6, 0.3, sizes]
    _close(run(d, "adam", arguments, [1, 2, 3, 4, 5], keeps=True))


def adam_weights(d: Draw) -> None:
    """Moments and weights are close, for lists that need several launches."""
    grad_type, state_type, _ = _adam_types(d)
    shapes = [(d.integer(1, 70), d.integer(1, 150)) for _ in range(d.one(1, 2, 30))]
    grads = [d.tensor(*shape, dtype=grad_type) for shape in shapes]
    weights = [d.tensor(*shape, dtype=grad_type) for shape in shapes]
    m = [d.tensor(*shape, dtype=state_type) for shape in shapes]
    v = [d.tensor(*shape, dtype=state_type).square() for shape in shapes]
    sizes = d.one(None, d.tensor(len(grads), 4).abs() + 1e-6)
    if sizes is not None and d.one(True, False):  # its gradient counts as zero
        sizes[0, 1] = 0.0
        grads[0].fill_(d.one(float("nan"), float("inf")))
    arguments = [weights, grads, m, v, 0.9, 0.999, 1e-6, 0.3, d.one(1.0, 0.9), 0.1, sizes]
    found = run(d, "adam_weights", arguments, [0, 2, 3], keeps=True)
    assert all(bool(ours.isfinite().all()) for ours, _ in found)
    _close(found)


def many_tensors(d: Draw) -> None:
    """As many as need several launches, of sizes that leave some without entries."""
    sizes = [d.integer(0, 3) for _ in range(4)]
    shapes = [(1 + i % 3, sizes[i % 4]) for i in range(d.one(17, 473, 500))]
    grads = [torch.full(shape, float(i % 7 - 3), device=d.device) for i, shape in enumerate(shapes)]
    lists = [grads, *([torch.ones_like(g) for g in grads] for _ in range(3))]
    own = torch.arange(1.0, 1 + 2 * len(grads), device=d.device).view(-1, 2)
    _close(run(d, "adam", [*lists, [], [], -1, 0.9, 0.999, 0.0, 0.0, own], [1, 2, 3], keeps=True))
    seeds = list(range(len(grads)))
    exactly(run(d, "gaussian_list", [[g.view(-1) for g in grads], seeds, [], 0.5], [0]))
    codes = [torch.full_like(g, i % 16, dtype=torch.uint8).view(-1) for i, g in enumerate(grads)]
    ones = [torch.full((-(-g.numel() // 2),), 0.5, device=d.device) for g in grads]
    flat = [g.view(-1) for g in grads]
    exactly(run(d, "dequantize_groups_list", [codes, ones, ones, flat, 2], [3]))
    packed = [own[: -(-len(own) // 2)] for own in codes]
    exactly(run(d, "dequantize_int4_list", [packed, ones, [], flat, "midrise", 2], [3]))
    alike = [torch.full((2, 3), float(i), device=d.device) for i in range(len(grads))]
    factors = [torch.full((1, 3), i % 3 / 4, device=d.device) for i in range(len(grads))]
    exactly(run(d, "write_back_list", [alike, alike, factors, 0.5], [0], keeps=True))
    absmax = [torch.ones(-(-g.numel() // 256), device=d.device) for g in grads]
    codes = [torch.full_like(g, 200, dtype=torch.uint8) for g in grads]
    lists = [grads, codes, absmax, codes, absmax, [torch.ones_like(g) for g in grads]]
    for ours, theirs in run(
        d, "adam_8bit", [*lists, 0.9, 0.999, 0.0, 0.0, own], [1, 2, 3, 4, 5], keeps=True
    ):
        if ours.dtype == torch.uint8:
            assert bool(((ours.int() - theirs.int()).abs() <= 1).all())
        else:
            _close([(ours, theirs)])


def adam_8bit(d: Draw) -> None:
    """Deltas are close, and codes at most one apart: rounding may fall to the neighbour."""
    grad_type, _, delta_type = _adam_types(d)
    shapes = [(d.integer(1, 70), d.integer(1, 150)) for _ in range(d.one(1, 2, 30))]
    grads = [d.tensor(*shape, dtype=grad_type) for shape in shapes]
    codes = [d.integers(*shape, high=256) for shape in shapes]
    absmax = [d.tensor(-(-grad.numel() // 256)).abs() for grad in grads]
    deltas = [torch.zeros_like(grad, dtype=delta_type) for grad in grads]
    sizes = d.one(None, d.tensor(len(grads), 2).abs() + 1e-6)
    arguments = [grads, codes, absmax, codes, absmax, deltas, 0.9, 0.999, 1e-6, 0.3, sizes]
    for ours, theirs in run(d, "adam_8bit", arguments, [1, 2, 3, 4, 5], keeps=True):
        if ours.dtype == torch.uint8:
            assert int((ours.int() - theirs.int()).abs().max()) <= 1
            assert float((ours != theirs).float().mean()) < 0.01 or ours.numel() < 500
        else:
            _close([(ours, theirs)])


def cautious_rows(d: Draw) -> None:
    """Codes, scales and directions are the same to the bit."""
    rows, columns, bits = d.integer(1, 40), d.integer(1, 300), d.one(4, 8)
    grad = d.tensor(rows, columns, dtype=d.one(*DTYPES))
    if d.one(True, False, False):
        grad[0, -1] = d.one(float("nan"), float("inf"))
    codes = d.integers(rows, code_bytes(columns, bits), high=256)
    scales = d.tensor(rows, blocks(columns)).abs()
    roots = [d.tensor(count).abs() for count in (rows, columns)]
    direction = torch.empty(rows, columns, device=d.device)
    arguments = [grad, codes, scales, *roots, direction, bits, d.one(True, False)]
    arguments += [0.1, 1e-8, d.one(0.1, 1.0), d.seed(), d.integer(0, 1 << 40)]
    arguments += [columns + d.integer(0, 50)]
    exactly(run(d, "cautious_rows", arguments, [1, 2, 5], keeps=True))


def limit_growth(d: Draw) -> None:
    """Factors and norms are the same to the bit, whatever the norms are."""
    count = d.one(1, 3, 20, 480)
    stored = d.tensor(count).abs()
    norms = d.one(stored * 1.005, d.tensor(count).abs())
    norms[0] = d.one(0.0, float("inf"), float("nan"), 1.0)
    good = d.one(None, d.integers(count, high=2).bool())
    arguments = [list(stored.unbind(0)), norms, good, torch.empty_like(norms), d.one(1.0, 1.01)]
    found = run(d, "limit_growth", arguments, [0, 3], keeps=True)
    exactly(found)
    flags = [] if good is None else good.tolist()
    for own, (ours, _), former in zip(flags, found, stored, strict=False):
        assert own or torch.equal(ours, former)


def _update(d: Draw, rows: int, columns: int) -> list[Any]:
    delta = d.one(None, d.tensor(rows, columns, dtype=d.one(torch.float32, torch.bfloat16)))
    if not d.one(True, False):
        return [delta, None, None]
    return [delta, *_scaled(d, rows, columns, d.one(torch.float32, torch.bfloat16))]


def _scaled(
    d: Draw, rows: int, columns: int, kind: torch.dtype, shape: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """A gradient and its factors; it may not be finite where they are zero."""
    grad = d.tensor(rows, columns, dtype=kind)
    factors = d.tensor(*(shape or (d.one(1, rows), d.one(1, columns))))
    if d.one(True, False):
        factors[d.integers(*factors.shape, high=3) == 0] = d.one(0.0, -0.0)
        grad = torch.where(factors == 0, d.one(float("nan"), float("inf")), grad).to(kind)
    return grad, factors


def write_back(d: Draw) -> None:
    """The weight is the same to the bit, rounded stochastically or not."""
    rows, columns = d.integer(1, 60), d.integer(1, 300)
    weight = d.tensor(rows, columns, dtype=d.one(*DTYPES))
    seed = d.one(None, d.seed())
    first = d.integer(0, 1 << 40)
    arguments = [weight, *_update(d, rows, columns), d.one(1.0, 0.9), 0.1, seed, first]
    arguments += [_device_sizes(d), _device_seed(d)]
    exactly(run(d, "write_back", arguments, [0], keeps=True))


def write_back_list(d: Draw) -> None:
    """Weights of one shape are the same to the bit, and finite."""
    rows, columns, kind = d.integer(1, 60), d.integer(1, 300), d.one(*DTYPES)
    weights = [d.tensor(rows, columns, dtype=kind) for _ in range(d.one(1, 2, 20))]
    shape = d.one(1, rows), d.one(1, columns)
    pairs = zip(*(_scaled(d, rows, columns, kind, shape) for _ in weights), strict=True)
    grads, factors = map(list, pairs)
    found = run(d, "write_back_list", [weights, grads, factors, d.one(1.0, 0.9)], [0], keeps=True)
    exactly(found)
    assert kind == torch.float16 or all(bool(ours.isfinite().all()) for ours, _ in found)


def write_back_int8(d: Draw) -> None:
    """Groups that change are requantised to the same bits; the others stay."""
    rows, columns, group = d.integer(1, 60), d.integer(1, 300), d.one(64, 256, 300)
    kind = d.one(torch.float32, torch.bfloat16)
    codes = d.integers(rows, columns, high=256)
    count = -(-codes.numel() // group)
    scales = d.tensor(count, dtype=kind).abs() + 1e-3
    zeros = d.integers(count, high=256).to(kind)
    keep, alpha = d.one((1.0, 0.1), (0.9, 0.1), (1.0, 0.0))
    arguments = [codes, scales, zeros, *_update(d, rows, columns), group, keep, alpha]
    arguments += [d.seed(), d.integer(0, 1 << 40), _device_sizes(d), _device_seed(d)]
    exactly(run(d, "write_back_int8", arguments, [0, 1, 2], keeps=True))


def write_back_int4(d: Draw) -> None:
    """Groups that change have the same bits, in their scale or a new one; the others stay."""
    rows, columns, group = d.integer(1, 60), d.integer(1, 300), d.one(30, 64, 256, 300)
    kind, numel = d.one(*DTYPES), rows * columns
    dense = d.tensor(numel, dtype=kind)
    codes, scales = int4_update.encode(dense.nan_to_num(), group)
    # Some scales are too narrow, some too wide, some are zero.
    scales *= d.integers(len(scales), high=5).to(kind) / 2
    keep, alpha = d.one((1.0, 0.1), (0.9, 0.1), (1.0, 0.0))
    arguments = [codes, scales, *_update(d, rows, columns), rows, columns, group, keep, alpha]
    arguments += [d.seed(), d.integer(0, 1 << 40), d.integer(0, 1 << 40)]
    arguments += [_device_sizes(d), _device_seed(d)]
    exactly(run(d, "write_back_int4", arguments, [0, 1], keeps=True))


#: Where kernels and references have the same bits, on every device.
EXACT = (
    blockwise_quantize,
    blockwise_dequantize,
    groups_quantize,
    groups_dequantize,
    groups_dequantize_list,
    int4_quantize,
    int4_dequantize,
    int4_dequantize_list,
    rademacher,
    gaussian,
    gaussian_list,
    stochastic_bfloat16,
    step_seeds,
    cautious_rows,
    limit_growth,
    write_back,
    write_back_list,
    write_back_int8,
    write_back_int4,
)
CASES = (*EXACT, adam, adam_weights, adam_8bit, many_tensors)
