"""Compiled Adam and write-backs; see `native_quantize` for what the functions return."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import adam as adam_reference
from .arguments import (
    MASK64,
    addresses,
    alike,
    dtype_code,
    expect,
    expect_groups,
    int64s,
    pointer,
    usable,
)
from .blockwise import both_tables
from .groups import group_count


def _expect_like(grads: list[Tensor], tensors: list[Tensor]) -> None:
    for grad, tensor in zip(grads, tensors, strict=True):
        expect("a state or direction", tensor, grad.numel())


def knows_adam(grads: list[Tensor], moments: list[Tensor], eight_bit: bool = False) -> bool:
    """Whether there is a compiled Adam for these tensors, with directions of the gradients' type.

    Args:
        grads: gradients.
        moments: first moments (or their codes), or both moments.
        eight_bit: moments are 8-bit codes.
    """
    stated = [grads[0]] if eight_bit else moments
    return usable(*grads, *moments) is not None and _adam_types(grads, stated, grads)


def _adam_types(grads: list[Tensor], moments: list[Tensor], directions: list[Tensor]) -> bool:
    """Whether the kernels support them: fp32, or bf16 with moments and directions in either."""
    known = (torch.float32,), (torch.float32, torch.bfloat16)
    allowed = known[int(grads[0].dtype == torch.bfloat16)]
    kinds = [{t.dtype for t in tensors} for tensors in (grads, moments, directions)]
    return all(len(kind) == 1 for kind in kinds) and all(kind <= set(allowed) for kind in kinds)


def adam(
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    directions: list[Tensor],
    grad_norms: list[Tensor],
    direction_norms: list[Tensor],
    axis: int,
    beta1: float,
    beta2: float,
    eps: float,
    size: float,
    sizes: Tensor | None,
) -> bool:
    """See `adam.adam`; norms are those of matrices."""
    moments = [*exp_avgs, *exp_avg_sqs]
    library = usable(*grads, *moments, *directions, *grad_norms, *direction_norms, sizes)
    if library is None or not _adam_types(grads, moments, directions):
        return False
    for lists in (exp_avgs, exp_avg_sqs, directions):
        _expect_like(grads, lists)
    expect("sizes", sizes, 2 * len(grads), torch.float32)
    shapes = [(1, t.numel()) if axis < 0 else (t.shape[0], t.shape[1]) for t in grads]
    if axis >= 0:
        for shape, *norms in zip(shapes, grad_norms, direction_norms, strict=True):
            for norm in norms:
                expect("norms", norm, shape[1 - axis], torch.float32)
    library.call(
        "adam",
        grads[0].device,
        *(len(grads), addresses(grads), addresses(exp_avgs), addresses(exp_avg_sqs)),
        *(addresses(directions), addresses(grad_norms), addresses(direction_norms)),
        *(int64s([rows for rows, _ in shapes]), int64s([columns for _, columns in shapes])),
        *(axis, dtype_code(grads[0]), dtype_code(exp_avgs[0]), dtype_code(directions[0])),
        *(beta1, beta2, eps, size, pointer(sizes)),
    )
    return True


def adam_weights(
    weights: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    beta1: float,
    beta2: float,
    eps: float,
    size: float,
    decay_factor: float,
    alpha: float,
    sizes: Tensor | None,
) -> bool:
    """See `adam.adam_weights`."""
    moments = [*exp_avgs, *exp_avg_sqs]
    library = usable(*weights, *grads, *moments, sizes)
    if library is None or not _adam_types(grads, moments, grads):
        return False
    if {t.dtype for t in weights} != {grads[0].dtype}:
        return False
    for lists in (weights, exp_avgs, exp_avg_sqs):
        _expect_like(grads, lists)
    expect("sizes", sizes, 4 * len(grads), torch.float32)
    library.call(
        "adam_weights",
        grads[0].device,
        *(len(grads), *map(addresses, (weights, grads, exp_avgs, exp_avg_sqs))),
        *(int64s([t.numel() for t in grads]), dtype_code(grads[0]), dtype_code(exp_avgs[0])),
        *(beta1, beta2, eps, size, decay_factor, alpha, pointer(sizes)),
    )
    return True


def adam_8bit(
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_absmax: list[Tensor],
    exp_avg_sqs: list[Tensor],
    exp_avg_sq_absmax: list[Tensor],
    directions: list[Tensor],
    beta1: float,
    beta2: float,
    eps: float,
    size: float,
    sizes: Tensor | None,
) -> bool:
    """See `adam.adam_8bit`."""
    lists = grads, exp_avgs, exp_avg_absmax, exp_avg_sqs, exp_avg_sq_absmax, directions
    library = usable(*(t for tensors in lists for t in tensors), sizes)
    if library is None or not _adam_types(grads, [grads[0]], directions):
        return False
    blocks = [group_count(t.numel(), adam_reference.BLOCK) for t in grads]
    for codes, absmax in ((exp_avgs, exp_avg_absmax), (exp_avg_sqs, exp_avg_sq_absmax)):
        _expect_like(grads, codes)
        for tensor, count in zip(absmax, blocks, strict=True):
            expect("absmax", tensor, count, torch.float32)
    _expect_like(grads, directions)
    expect("sizes", sizes, 2 * len(grads), torch.float32)
    tables, maps = both_tables(grads[0].device)
    library.call(
        "adam_8bit",
        grads[0].device,
        *(len(grads), *map(addresses, lists), int64s([t.numel() for t in grads])),
        *(dtype_code(grads[0]), dtype_code(directions[0]), beta1, beta2, eps, size, pointer(sizes)),
        *(tables.data_ptr(), maps.data_ptr()),
    )
    return True


def _strides(factors: Tensor | None) -> tuple[int, int]:
    """Steps from the factor of one row, or column, to the next one's."""
    if factors is None:
        return 0, 0
    rows, columns = factors.shape
    return (columns if rows > 1 else 0, 1 if columns > 1 else 0)


def _update(
    direction: Tensor | None, grad: Tensor | None, factors: Tensor | None
) -> tuple[object, ...]:
    """Pointers and types of an update's parts, and the strides of the factors."""
    return (
        *(pointer(direction), dtype_code(direction), pointer(grad), dtype_code(grad)),
        *(pointer(factors), *_strides(factors)),
    )


def _expect_update(
    shape: Sequence[int], direction: Tensor | None, grad: Tensor | None, factors: Tensor | None
) -> None:
    rows, columns = shape
    expect("direction", direction, rows * columns)
    expect("grad", grad, rows * columns)
    if (grad is None) != (factors is None):
        raise ValueError("grad without factors, or factors without grad: both or neither")
    if factors is not None and (
        factors.dtype != torch.float32
        or factors.dim() != 2
        or factors.shape[0] not in (1, rows)
        or factors.shape[1] not in (1, columns)
    ):
        raise ValueError(
            f"factors are {tuple(factors.shape)} {factors.dtype}; they must be (1 or {rows}, 1 or "
            f"{columns}) torch.float32"
        )


def _expect_on_device(sizes: Tensor | None, device_seed: Tensor | None) -> None:
    expect("sizes", sizes, 2, torch.float32)
    expect("device_seed", device_seed, 1, torch.int64)


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
) -> bool:
    """See `write_back.write_back`."""
    library = usable(weight, direction, grad, factors, sizes, device_seed)
    if library is None:
        return False
    _expect_update(weight.shape, direction, grad, factors)
    _expect_on_device(sizes, device_seed)
    rounds = seed is not None or device_seed is not None
    library.call(
        "write_back",
        weight.device,
        *(weight.data_ptr(), dtype_code(weight), *_update(direction, grad, factors), *weight.shape),
        *(decay_factor, alpha, int(rounds), (seed or 0) & MASK64, first & MASK64),
        *(pointer(sizes), pointer(device_seed)),
    )
    return True


def write_back_list(
    weights: list[Tensor], grads: list[Tensor], factors: list[Tensor], decay_factor: float
) -> bool:
    """See `write_back.write_back_list`."""
    library = usable(*weights, *grads, *factors)
    if library is None or not alike([*weights, *grads]) or weights[0].numel() >= 1 << 31:
        return False
    for weight, grad, own in zip(weights, grads, factors, strict=True):
        _expect_update(weight.shape, None, grad, own)
        if weight.shape != weights[0].shape or own.shape != factors[0].shape:
            raise ValueError(
                f"a weight is {tuple(weight.shape)} and its factors are {tuple(own.shape)}; all "
                f"must be as the first, {tuple(weights[0].shape)} and {tuple(factors[0].shape)}"
            )
    library.call(
        "write_back_list",
        weights[0].device,
        *(len(weights), addresses(weights), addresses(grads), addresses(factors)),
        *(dtype_code(weights[0]), *_strides(factors[0]), *weights[0].shape, decay_factor),
    )
    return True


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
) -> bool:
    """See `write_back.write_back_int8`."""
    library = usable(codes, scales, zeros, direction, grad, factors, sizes, device_seed)
    if library is None:
        return False
    _expect_update(codes.shape, direction, grad, factors)
    expect_groups(scales, zeros, codes.numel(), group_size)
    _expect_on_device(sizes, device_seed)
    library.call(
        "write_back_int8",
        codes.device,
        *(codes.data_ptr(), scales.data_ptr(), zeros.data_ptr(), dtype_code(scales)),
        *(*_update(direction, grad, factors), *codes.shape),
        *(group_size, decay_factor, alpha, seed & MASK64, first & MASK64),
        *(pointer(sizes), pointer(device_seed)),
    )
    return True


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
) -> bool:
    """See `write_back.write_back_int4`; an odd group size is left to it."""
    given = codes, scales, direction, grad, factors, sizes, device_turn
    library = None if group_size % 2 else usable(*given)
    if library is None:
        return False
    expect("codes", codes, -(-rows * columns // 2), torch.uint8)
    _expect_update((rows, columns), direction, grad, factors)
    expect_groups(scales, None, rows * columns, group_size)
    expect("sizes", sizes, 2, torch.float32)
    expect("device_turn", device_turn, 1, torch.int64)
    library.call(
        "write_back_int4",
        codes.device,
        *(codes.data_ptr(), scales.data_ptr(), dtype_code(scales)),
        *(*_update(direction, grad, factors), rows, columns),
        *(group_size, decay_factor, alpha, seed & MASK64, first & MASK64, turn),
        *(pointer(sizes), pointer(device_turn)),
    )
    return True
