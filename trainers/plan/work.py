"""What single operations move and compute on a GPU, from their tensors' shapes alone.

Bytes are the least that an operation has to move: each tensor that it reads is read once, each that
it writes is written once, caches keep nothing from one operation to the next, and what overwrites a
tensor doesn't read it. Entries that an expanded tensor repeats count once. Of a tensor that is
indexed only the picked entries count. Floating-point operations are those of matrix products and
decompositions; all else is bound by its bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: Kinds of arithmetic whose rates a card has.
UNITS = ("bf16", "tf32", "fp32", "fp64")


@dataclass(frozen=True)
class Work:
    """What an operation asks of a GPU.

    Attributes:
        name: of the operation.
        launches: of kernels.
        moved: bytes read and written.
        flops: floating-point operations of products and decompositions, 0 of others.
        unit: what computes them, one of `UNITS`.
        share: of the rate of products that they are taken to reach; below 1 for decompositions.
    """

    name: str
    launches: int
    moved: int
    flops: float = 0.0
    unit: str = "fp32"
    share: float = 1.0


#: In-place operations that don't read what they write.
_OVERWRITING = {"copy_", "zero_", "fill_", "normal_", "uniform_", "random_", "bernoulli_"}
_OVERWRITING |= {"exponential_", "_foreach_copy_", "_foreach_zero_"}
#: Arguments of our operations that are written without being read; of those that quantise all are.
_OUTPUTS = {"out", "outs", "directions", "grad_norms", "direction_norms", "factors"}
_PICKING = {"index", "index_select", "gather", "embedding", "take_along_dim"}
_PLACING = {"index_put_", "index_copy_", "index_add_", "scatter_", "scatter_add_", "index_fill_"}
_PLACING |= {"_index_put_impl_"}


def work_of(
    func: Any, label: str, args: Any, kwargs: dict[str, Any], made: list[Tensor], launches: int
) -> Work:
    """What an operation moves and computes.

    Args:
        func: of torch's dispatcher.
        label: its name for people.
        args: its arguments.
        kwargs: those by name.
        made: tensors that it returns.
        launches: of kernels.
    """
    name = func._schema.name.rpartition("::")[2]
    flops, unit, share = _computed(name, args, kwargs, made)
    return Work(label, launches, _moved(func, name, args, kwargs, made), flops, unit, share)


def _moved(func: Any, name: str, args: Any, kwargs: dict[str, Any], made: list[Tensor]) -> int:
    read: dict[Any, int] = {}
    written: dict[Any, int] = {}
    for argument, value in _arguments(func, args, kwargs):
        tensors = [own for own in _tensors(value) if own.is_cuda]
        changed = argument.alias_info is not None and argument.alias_info.is_write
        if changed:
            written |= {_place(own): _bytes(own) for own in tensors}
        if not (changed and _overwrites(func, name, argument)) and not _unused(argument, kwargs):
            read |= {_place(own): _bytes(own) for own in tensors}
    results = {_place(own): _bytes(own) for own in made if own.is_cuda}
    if name in _PICKING:
        source = next((_place(own) for own in _tensors(args) if own.is_cuda), None)
        read[source] = min(read.get(source, 0), sum(results.values()))
    elif name in _PLACING:
        # Besides positions and values only the places themselves.
        target = _place(args[0])
        placed = _placed(args)
        read.pop(target, None)
        written[target] = min(written.get(target, placed), placed)
        results.pop(target, None)
        if "add" in name or kwargs.get("accumulate", False):
            read[target] = written[target]
    return sum(read.values()) + sum((results | written).values())


def _arguments(func: Any, args: Any, kwargs: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """An operation's arguments as its schema has them, with their values."""
    for position, argument in enumerate(func._schema.arguments):
        if position < len(args):
            yield argument, args[position]
        elif argument.name in kwargs:
            yield argument, kwargs[argument.name]


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [own for item in value for own in _tensors(item)]
    return []


def _overwrites(func: Any, name: str, argument: Any) -> bool:
    if func.namespace == "lowrank":
        return argument.name in _OUTPUTS or name.startswith("quantize")
    return bool(argument.is_out) or name in _OVERWRITING


def _unused(argument: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a product adds nothing to the tensor that it is given for that."""
    return argument.name in ("self", "input") and kwargs.get("beta", 1) == 0


def _place(tensor: Tensor) -> Any:
    storage = tensor.untyped_storage()._cdata
    return storage, tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


def _bytes(tensor: Tensor) -> int:
    """Of a tensor's distinct entries."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return (
        math.prod(size for size, stride in pairs if stride)
        * tensor.element_size()
        * (tensor.numel() > 0)
    )


def _placed(args: Any) -> int:
    """Bytes of the entries that an operation puts in places of its first argument."""
    entries = max((own.numel() for own in _tensors(args[1:])), default=0)
    return entries * int(args[0].element_size())


#: The share of the rate of products that eigenvalues and singular values are taken to run at.
SOLVERS = 0.02
#: Operations of a decomposition of (batch, d, k), and the share of the rate of products that it is
#: taken to reach. Shares are assumptions: eigenvalues of symmetric matrices are known to stay below
#: 3 % of what a card computes in products.
_DECOMPOSITIONS: dict[str, tuple[Callable[[int, int], float], float]] = {
    "linalg_cholesky_ex": (lambda d, k: k**3 / 3, 0.1),
    "linalg_inv_ex": (lambda d, k: 2.0 * k**3, 0.1),
    "_linalg_solve_ex": (lambda d, k: 8 / 3 * k**3, 0.1),
    "linalg_lu_factor_ex": (lambda d, k: 2 / 3 * k**3, 0.1),
    "linalg_qr": (lambda d, k: 4.0 * d * k * k - 4 / 3 * k**3, 0.05),
    "linalg_householder_product": (lambda d, k: 2.0 * d * k * k, 0.05),
    "geqrf": (lambda d, k: 2.0 * d * k * k, 0.05),
    "_linalg_eigh": (lambda d, k: 9.0 * k**3, SOLVERS),
    "_linalg_svd": (lambda d, k: 6.0 * d * k * k + 20.0 * k**3, SOLVERS),
}
_SOLVING, _SOLVING_SHARE = "linalg_solve_triangular", 0.3


def _computed(
    name: str, args: Any, kwargs: dict[str, Any], made: list[Tensor]
) -> tuple[float, str, float]:
    """Operations, what computes them, and the share of its rate."""
    plain = name.removesuffix("_")
    if plain in ("mm", "bmm", "mv", "dot", "vdot"):
        left, right = args[0], args[1]
    elif plain in ("addmm", "baddbmm", "addbmm", "addmv"):
        left, right = args[1], args[2]
    elif name in _DECOMPOSITIONS:
        matrix = args[0]
        count, share = _DECOMPOSITIONS[name]
        k, d = sorted(matrix.shape[-2:])
        batch = matrix.numel() // max(1, d * k)
        return batch * count(d, k), _exact(matrix), share
    elif name == _SOLVING:
        triangle, matrix = args[0], args[1]
        return float(matrix.numel()) * triangle.shape[-1], _exact(matrix), _SOLVING_SHARE
    else:
        return 0.0, "fp32", 1.0
    columns = right.shape[-1] if right.dim() > 1 and plain not in ("mv", "addmv") else 1
    return 2.0 * left.numel() * columns, _unit(left), 1.0


def _unit(tensor: Tensor) -> str:
    if tensor.dtype in (torch.bfloat16, torch.float16):
        return "bf16"
    if tensor.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return _exact(tensor)


def _exact(tensor: Tensor) -> str:
    return "fp64" if tensor.dtype == torch.float64 else "fp32"
