"""Applying an update to a weight in one pass, in plain torch.

    W <- decay_factor W - alpha D - f o G

D is an update in the weight's shape, G a gradient and f its factors by row, by column or neither.
Where a factor is exactly 0 nothing of G is taken, not even NaN or infinity: so a gradient that
isn't finite is left out by numbers on the device.
A bf16 weight may be rounded stochastically; groups of an INT8 weight that change get a new range
and stochastic codes, those of an INT4 weight (`int4_update`) keep their scale while it fits. The
noise of an entry depends on the seed and its position alone, in four bits on the step as well.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import int4, int4_update
from .groups import chunk_elements, dequantize_flat, quantize_flat, spans
from .noise import Seed, round_stochastically


def write_back(
    weight: Tensor,
    direction: Tensor | None,
    grad: Tensor | None,
    factors: Tensor | None,
    decay_factor: float,
    alpha: float,
    seed: int | None,
    first: int,
    sizes: Tensor | None = None,
    device_seed: Tensor | None = None,
) -> None:
    """The reference of `torch.ops.lowrank.write_back`.

    Args:
        weight: k x n, contiguous; changed in place.
        direction: D, k x n, or None.
        grad: G, k x n, or None.
        factors: f, fp32 of shape (1 or k, 1 or n); given exactly with `grad`.
        decay_factor: 1 less the weight decay.
        alpha: step size of D.
        seed: rounds a bf16 weight stochastically when given.
        first: position of the first entry, for the noise.
        sizes: replaces `decay_factor` and `alpha`: fp32 of these two entries.
        device_seed: replaces `seed`: int64 of one entry.
    """
    own = _seed_of(seed, device_seed)
    rows, columns = weight.shape
    step = chunk_elements(weight.device, max(1, columns)) // max(1, columns)
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    for start in range(0, rows, step):
        span = slice(start, start + step)
        chunk = weight[span].to(wide)
        if chunk.dtype == weight.dtype:
            chunk = chunk.clone()
        _apply(chunk, direction, grad, factors, decay_factor, alpha, span, sizes)
        if own is not None and weight.dtype == torch.bfloat16:
            round_stochastically(chunk, weight[span], own, first + start * columns)
        else:
            weight[span].copy_(chunk)


def write_back_list(
    weights: list[Tensor], grads: list[Tensor], factors: list[Tensor], decay_factor: float
) -> None:
    """The reference of `torch.ops.lowrank.write_back_list`: W <- decay_factor W - f o G of each.

    Args:
        weights: k x n, contiguous, of one shape and dtype; changed in place.
        grads: of their shape and dtype.
        factors: as in `write_back`, of one shape.
        decay_factor: as in `write_back`.
    """
    for weight, grad, own in zip(weights, grads, factors, strict=True):
        write_back(weight, None, grad, own, decay_factor, 0.0, None, 0)


def write_back_int8(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    direction: Tensor | None,
    grad: Tensor | None,
    factors: Tensor | None,
    group_size: int,
    decay_factor: float,
    alpha: float,
    seed: int,
    first: int,
    sizes: Tensor | None = None,
    device_seed: Tensor | None = None,
) -> None:
    """The reference of `torch.ops.lowrank.write_back_int8`.

    Args:
        codes: uint8, k x n, contiguous; changed in place like scales and zeros. It begins with a
            group; the last one may be shorter.
        scales: one a group.
        zeros: one a group.
        direction: as in `write_back`.
        grad: as in `write_back`.
        factors: as in `write_back`.
        group_size: entries that share a scale.
        decay_factor: as in `write_back`.
        alpha: as in `write_back`.
        seed: of the rounding.
        first: position of the first entry, for the noise.
        sizes: as in `write_back`.
        device_seed: as in `write_back`.
    """
    own = _seed_of(seed, device_seed)
    wide = torch.float64 if scales.dtype == torch.float64 else torch.float32
    old = torch.empty(codes.shape, dtype=wide, device=codes.device)
    dequantize_flat(codes.view(-1), scales, zeros, old.view(-1), group_size)
    new = old.clone()
    _apply(new, direction, grad, factors, decay_factor, alpha, slice(None), sizes)
    store_changed(new.view(-1), old.view(-1), codes.view(-1), scales, zeros, group_size, own, first)


def write_back_int4(
    codes: Tensor,
    scales: Tensor,
    direction: Tensor | None,
    grad: Tensor | None,
    factors: Tensor | None,
    rows: int,
    columns: int,
    group_size: int,
    decay_factor: float,
    alpha: float,
    seed: int,
    first: int,
    turn: int,
    sizes: Tensor | None = None,
    device_turn: Tensor | None = None,
) -> None:
    """The reference of `torch.ops.lowrank.write_back_int4`.

    Args:
        codes: uint8 (ceil(rows columns / 2),), two codes a byte; changed in place like scales. It
            begins with a group; the last one may be shorter.
        scales: one a group.
        direction: as in `write_back`.
        grad: as in `write_back`.
        factors: as in `write_back`.
        rows: of the weight.
        columns: of the weight.
        group_size: entries that share a scale, an even number.
        decay_factor: as in `write_back`.
        alpha: as in `write_back`.
        seed: of the rounding.
        first: position of the first entry, for the noise.
        turn: number of the step, for the noise.
        sizes: as in `write_back`.
        device_turn: replaces `turn`: int64 of one entry.
    """
    wide = torch.float64 if scales.dtype == torch.float64 else torch.float32
    old = torch.empty((rows, columns), dtype=wide, device=codes.device)
    int4.dequantize_flat(codes, scales, None, old.view(-1), int4_update.FORMAT, group_size)
    new = old.clone()
    _apply(new, direction, grad, factors, decay_factor, alpha, slice(None), sizes)
    own = turn if device_turn is None else device_turn.view(())
    int4_update.store_changed(
        new.view(-1), old.view(-1), codes, scales, group_size, seed, first, own
    )


def store_changed(
    new: Tensor,
    old: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    group_size: int,
    seed: Seed | None,
    first: int,
) -> None:
    """Requantises the groups in which `new` differs from `old`, each with its own new range.

    Args:
        new: flat entries.
        old: the dequantised entries.
        codes: flat, changed in place like scales and zeros.
        scales: one a group.
        zeros: one a group.
        group_size: entries that share a scale.
        seed: rounds stochastically when given.
        first: position of the first entry, for the noise.
    """
    fresh = torch.empty_like(codes), torch.empty_like(scales), torch.empty_like(zeros)
    quantize_flat(new, *fresh, 255, group_size, seed, first)
    for start, stop, width in spans(new.numel(), group_size, new.device):
        begin = start // group_size
        span = slice(begin, begin + (stop - start) // width)
        changed = (new[start:stop] != old[start:stop]).view(-1, width).any(1)
        for target, value in ((scales, fresh[1]), (zeros, fresh[2])):
            target[span].copy_(torch.where(changed, value[span], target[span]))
        codes_gw = codes[start:stop].view(-1, width)
        fresh_gw = fresh[0][start:stop].view(-1, width)
        codes_gw.copy_(torch.where(changed.unsqueeze(1), fresh_gw, codes_gw))


def _seed_of(seed: int | None, device_seed: Tensor | None) -> Seed | None:
    return seed if device_seed is None else device_seed.view(())


def _apply(
    wide_kn: Tensor,
    direction: Tensor | None,
    grad: Tensor | None,
    factors: Tensor | None,
    decay_factor: float,
    alpha: float,
    span: slice,
    sizes: Tensor | None,
) -> None:
    """In place on some rows: W <- decay_factor W - alpha D - f o G."""
    decay: float | Tensor = decay_factor
    size: float | Tensor = alpha
    if sizes is not None:
        decay, size = sizes.view(2).unbind()
    if isinstance(decay, Tensor) or decay != 1.0:
        wide_kn.mul_(decay)
    if direction is not None:
        wide_kn.sub_(direction[span].to(wide_kn.dtype) * size)
    if grad is not None and factors is not None:
        own = factors[span] if factors.shape[0] > 1 else factors
        own = own.to(wide_kn.dtype)
        wide_kn.sub_(torch.where(own != 0, grad[span].to(wide_kn.dtype) * own, 0.0))
