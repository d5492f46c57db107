"""The compiled implementation of each operation: tensors in, a call through the C interface.

Each function takes what the operation's schema says and returns whether it did the work: False
where the library is not there, kernels are switched off, or the types are not theirs, so that the
reference in plain torch does it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from . import adam as adam_reference
from .blockwise import both_tables, dynamic_map, rank_table
from .groups import group_count
from .int4 import MIDRISE_SHARE, nf4_values
from .library import Library, library_for

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_FORMATS = {"asymmetric": 0, "midrise": 1, "nf4": 2}
_SIGNED_ZERO = 127
_MASK64 = (1 << 64) - 1


def usable(*tensors: Tensor | None) -> Library | None:
    """The library, if these tensors are contiguous, on one device and of types that it knows."""
    given = [t for t in tensors if t is not None]
    library = library_for(given)
    if library is None:
        return None
    device = given[0].device
    for tensor in given:
        if tensor.device != device or not tensor.is_contiguous():
            return None
        if tensor.is_floating_point() and tensor.dtype not in DTYPES:
            return None
    return library


def _expect(name: str, tensor: Tensor | None, count: int, dtype: torch.dtype | None = None) -> None:
    """Raises `ValueError` for a buffer that a kernel would read or write beyond."""
    if tensor is None:
        return
    wanted = dtype or tensor.dtype
    if tensor.numel() != count or tensor.dtype != wanted:
        raise ValueError(
            f"{name} has {tensor.numel()} entries of {tensor.dtype}; it must have {count} of "
            f"{wanted}"
        )


def _expect_groups(scales: Tensor, zeros: Tensor | None, numel: int, group_size: int) -> None:
    for name, tensor in (("scales", scales), ("zeros", zeros)):
        _expect(name, tensor, group_count(numel, group_size), scales.dtype)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _dtype(tensor: Tensor | None) -> int:
    return 0 if tensor is None else DTYPES[tensor.dtype]


def quantize_blockwise(x: Tensor, codes: Tensor, absmax: Tensor, signed: bool, block: int) -> bool:
    """See `blockwise.quantize_flat`."""
    library = usable(x, codes, absmax)
    if library is None:
        return False
    _expect("codes", codes, x.numel(), torch.uint8)
    _expect("absmax", absmax, group_count(x.numel(), block), torch.float32)
    table = rank_table(signed, x.device)
    library.call(
        "quantize_blockwise",
        x.device,
        *(x.data_ptr(), _dtype(x), codes.data_ptr(), absmax.data_ptr(), x.numel(), block),
        *(table.data_ptr(), _SIGNED_ZERO if signed else 0),
    )
    return True


def dequantize_blockwise(
    codes: Tensor, absmax: Tensor, out: Tensor, signed: bool, block: int
) -> bool:
    """See `blockwise.dequantize_flat`."""
    library = usable(codes, absmax, out)
    if library is None:
        return False
    _expect("codes", codes, out.numel(), torch.uint8)
    _expect("absmax", absmax, group_count(out.numel(), block), torch.float32)
    values = dynamic_map(signed, out.device)
    library.call(
        "dequantize_blockwise",
        out.device,
        *(codes.data_ptr(), absmax.data_ptr(), out.data_ptr(), _dtype(out)),
        *(out.numel(), block, values.data_ptr()),
    )
    return True


def quantize_groups(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    levels: int,
    group_size: int,
    seed: int | None,
    first: int,
) -> bool:
    """See `groups.quantize_flat`."""
    library = usable(x, codes, scales, zeros)
    if library is None:
        return False
    _expect("codes", codes, x.numel(), torch.uint8)
    _expect_groups(scales, zeros, x.numel(), group_size)
    library.call(
        "quantize_groups",
        x.device,
        *(x.data_ptr(), _dtype(x), codes.data_ptr(), scales.data_ptr(), zeros.data_ptr()),
        *(_dtype(scales), x.numel(), group_size, levels, int(seed is not None)),
        *((seed or 0) & _MASK64, first & _MASK64),
    )
    return True


def dequantize_groups(
    codes: Tensor, scales: Tensor, zeros: Tensor, out: Tensor, group_size: int
) -> bool:
    """See `groups.dequantize_flat`."""
    library = usable(codes, scales, zeros, out)
    if library is None:
        return False
    _expect("codes", codes, out.numel(), torch.uint8)
    _expect_groups(scales, zeros, out.numel(), group_size)
    library.call(
        "dequantize_groups",
        out.device,
        *(codes.data_ptr(), scales.data_ptr(), zeros.data_ptr(), _dtype(scales)),
        *(out.data_ptr(), _dtype(out), out.numel(), group_size),
    )
    return True


def quantize_int4(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, format: str, group_size: int
) -> bool:
    """See `int4.quantize_flat`; an odd group size, whose groups share bytes, is left to it."""
    library = None if group_size % 2 else usable(x, codes, scales, zeros)
    if library is None:
        return False
    _expect("codes", codes, -(-x.numel() // 2), torch.uint8)
    _expect_groups(scales, zeros, x.numel(), group_size)
    library.call(
        "quantize_int4",
        x.device,
        *(x.data_ptr(), _dtype(x), codes.data_ptr(), scales.data_ptr(), _pointer(zeros)),
        *(_dtype(scales), x.numel(), group_size, _FORMATS[format]),
        *(MIDRISE_SHARE if format == "midrise" else 1.0, nf4_values(x.device).data_ptr()),
    )
    return True


def dequantize_int4(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, out: Tensor, format: str, group_size: int
) -> bool:
    """See `int4.dequantize_flat`."""
    library = None if group_size % 2 else usable(codes, scales, zeros, out)
    if library is None:
        return False
    _expect("codes", codes, -(-out.numel() // 2), torch.uint8)
    _expect_groups(scales, zeros, out.numel(), group_size)
    library.call(
        "dequantize_int4",
        out.device,
        *(codes.data_ptr(), scales.data_ptr(), _pointer(zeros), _dtype(scales)),
        *(out.data_ptr(), _dtype(out), out.numel(), group_size),
        *(_FORMATS[format], nf4_values(out.device).data_ptr()),
    )
    return True


def rademacher(out: Tensor, seed: int) -> bool:
    """See `sketch.fill_flat`."""
    library = usable(out)
    if library is None:
        return False
    pointer = out.data_ptr()
    library.call("rademacher", out.device, pointer, _dtype(out), out.numel(), seed & _MASK64)
    return True


def stochastic_bfloat16(x: Tensor, out: Tensor, seed: int, first: int) -> bool:
    """See `noise.stochastic_flat`."""
    library = usable(x, out)
    if library is None or x.dtype != torch.float32:
        return False
    _expect("out", out, x.numel(), torch.bfloat16)
    positions = seed & _MASK64, first & _MASK64
    library.call(
        "stochastic_bfloat16", x.device, x.data_ptr(), out.data_ptr(), x.numel(), *positions
    )
    return True


def _addresses(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*[t.data_ptr() for t in tensors])


def _sizes(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)


def _expect_like(grads: list[Tensor], tensors: list[Tensor]) -> None:
    for grad, tensor in zip(grads, tensors, strict=True):
        _expect("a state or delta", tensor, grad.numel())


def knows_adam(grads: list[Tensor], moments: list[Tensor], eight_bit: bool = False) -> bool:
    """Whether there is a compiled Adam for these tensors, with deltas of the gradients' type.

    Args:
        grads: gradients.
        moments: first moments (or their codes), or both moments.
        eight_bit: moments are 8-bit codes.
    """
    stated = [grads[0]] if eight_bit else moments
    return usable(*grads, *moments) is not None and _adam_types(grads, stated, grads)


def _adam_types(grads: list[Tensor], moments: list[Tensor], deltas: list[Tensor]) -> bool:
    """Whether the kernels know them: fp32, or bf16 with moments and deltas in either."""
    known = (torch.float32,), (torch.float32, torch.bfloat16)
    allowed = known[int(grads[0].dtype == torch.bfloat16)]
    kinds = [{t.dtype for t in tensors} for tensors in (grads, moments, deltas)]
    return all(len(kind) == 1 for kind in kinds) and all(kind <= set(allowed) for kind in kinds)


def adam(
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    deltas: list[Tensor],
    grad_norms: list[Tensor],
    delta_norms: list[Tensor],
    axis: int,
    beta1: float,
    beta2: float,
    eps: float,
    size: float,
    sizes: Tensor | None,
) -> bool:
    """See `adam.adam`; norms are those of matrices."""
    moments = [*exp_avgs, *exp_avg_sqs]
    library = usable(*grads, *moments, *deltas, *grad_norms, *delta_norms, sizes)
    if library is None or not _adam_types(grads, moments, deltas):
        return False
    for lists in (exp_avgs, exp_avg_sqs, deltas):
        _expect_like(grads, lists)
    _expect("sizes", sizes, 2 * len(grads), torch.float32)
    shapes = [(1, t.numel()) if axis < 0 else (t.shape[0], t.shape[1]) for t in grads]
    if axis >= 0:
        for shape, *norms in zip(shapes, grad_norms, delta_norms, strict=True):
            for norm in norms:
                _expect("norms", norm, shape[1 - axis], torch.float32)
    library.call(
        "adam",
        grads[0].device,
        *(len(grads), _addresses(grads), _addresses(exp_avgs), _addresses(exp_avg_sqs)),
        *(_addresses(deltas), _addresses(grad_norms), _addresses(delta_norms)),
        *(_sizes([rows for rows, _ in shapes]), _sizes([columns for _, columns in shapes])),
        *(axis, _dtype(grads[0]), _dtype(exp_avgs[0]), _dtype(deltas[0])),
        *(beta1, beta2, eps, size, _pointer(sizes)),
    )
    return True


def adam_8bit(
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_absmax: list[Tensor],
    exp_avg_sqs: list[Tensor],
    exp_avg_sq_absmax: list[Tensor],
    deltas: list[Tensor],
    beta1: float,
    beta2: float,
    eps: float,
    size: float,
    sizes: Tensor | None,
) -> bool:
    """See `adam.adam_8bit`."""
    lists = grads, exp_avgs, exp_avg_absmax, exp_avg_sqs, exp_avg_sq_absmax, deltas
    library = usable(*(t for tensors in lists for t in tensors), sizes)
    if library is None or not _adam_types(grads, [grads[0]], deltas):
        return False
    blocks = [group_count(t.numel(), adam_reference.BLOCK) for t in grads]
    for codes, absmax in ((exp_avgs, exp_avg_absmax), (exp_avg_sqs, exp_avg_sq_absmax)):
        _expect_like(grads, codes)
        for tensor, count in zip(absmax, blocks, strict=True):
            _expect("absmax", tensor, count, torch.float32)
    _expect_like(grads, deltas)
    _expect("sizes", sizes, 2 * len(grads), torch.float32)
    tables, maps = both_tables(grads[0].device)
    library.call(
        "adam_8bit",
        grads[0].device,
        *(len(grads), *map(_addresses, lists), _sizes([t.numel() for t in grads])),
        *(_dtype(grads[0]), _dtype(deltas[0]), beta1, beta2, eps, size, _pointer(sizes)),
        *(tables.data_ptr(), maps.data_ptr()),
    )
    return True


def _update(
    delta: Tensor | None, grad: Tensor | None, factors: Tensor | None
) -> tuple[object, ...]:
    """Pointers and types of an update's parts, and the strides of the factors."""
    strides = (0, 0)
    if factors is not None:
        rows, columns = factors.shape
        strides = (columns if rows > 1 else 0, 1 if columns > 1 else 0)
    return (
        *(_pointer(delta), _dtype(delta), _pointer(grad), _dtype(grad), _pointer(factors)),
        *strides,
    )


def _expect_update(
    weight: Tensor, delta: Tensor | None, grad: Tensor | None, factors: Tensor | None
) -> None:
    rows, columns = weight.shape
    _expect("delta", delta, weight.numel())
    _expect("grad", grad, weight.numel())
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


def write_back(
    weight: Tensor,
    delta: Tensor | None,
    grad: Tensor | None,
    factors: Tensor | None,
    keep: float,
    alpha: float,
    seed: int | None,
    first: int,
) -> bool:
    """See `write_back.write_back`."""
    library = usable(weight, delta, grad, factors)
    if library is None:
        return False
    _expect_update(weight, delta, grad, factors)
    library.call(
        "write_back",
        weight.device,
        *(weight.data_ptr(), _dtype(weight), *_update(delta, grad, factors), *weight.shape),
        *(keep, alpha, int(seed is not None), (seed or 0) & _MASK64, first & _MASK64),
    )
    return True


def write_back_int8(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    delta: Tensor | None,
    grad: Tensor | None,
    factors: Tensor | None,
    group_size: int,
    keep: float,
    alpha: float,
    seed: int,
    first: int,
) -> bool:
    """See `write_back.write_back_int8`."""
    library = usable(codes, scales, zeros, delta, grad, factors)
    if library is None:
        return False
    _expect_update(codes, delta, grad, factors)
    _expect_groups(scales, zeros, codes.numel(), group_size)
    library.call(
        "write_back_int8",
        codes.device,
        *(codes.data_ptr(), scales.data_ptr(), zeros.data_ptr(), _dtype(scales)),
        *(*_update(delta, grad, factors), *codes.shape),
        *(group_size, keep, alpha, seed & _MASK64, first & _MASK64),
    )
    return True
