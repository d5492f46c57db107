"""An INT8 weight that a training loop can use as any other parameter.

`Int8Weight` is a tensor subclass with an apparent dtype (bf16, fp32), `requires_grad` and an
ordinary dense `.grad`, over uint8 codes and a scale and a zero point for each group of entries
(Q-GaLore, arXiv 2407.08296, section 3.4; formulas in `lowrank.cuda.groups`). `F.linear` makes
a temporary dense copy of the layer's weight, which neither forward nor backward keeps. Every other
operation acts on a dense copy. Only `copy_` and the optimizers of this package, which round
stochastically (`rows.editable_rows`), change it. Any other in-place operation raises.

Memory: m n bytes, and for each group two numbers of the apparent dtype.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowrank.cuda import groups
from lowrank.cuda.noise import signed_seed
from lowrank.cuda.write_back import store_changed

from .int8_linear import int8_linear

aten = torch.ops.aten
_INNER = ("codes", "scales", "zeros")
_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]


class Int8Weight(Tensor):
    """A matrix in eight bits; see the module.

    Attributes:
        codes: uint8, of the matrix's shape, contiguous.
        scales: one a group, in the apparent dtype.
        zeros: one a group, in the apparent dtype.
        group_size: entries of the flattened matrix that share a scale; the last group may have
            fewer.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    group_size: int

    @staticmethod
    def __new__(
        cls,
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor,
        group_size: int,
        requires_grad: bool = False,
    ) -> Int8Weight:
        """Wraps the tensors, without copies.

        Raises:
            ValueError: they don't fit together.
        """
        count = groups.group_count(codes.numel(), group_size)
        if codes.dtype != torch.uint8 or not codes.is_contiguous():
            raise ValueError(f"codes are {codes.dtype}: accepted are contiguous uint8")
        for name, part in (("scales", scales), ("zeros", zeros)):
            if part.shape != (count,) or part.dtype != scales.dtype or part.device != codes.device:
                raise ValueError(
                    f"{name} are {tuple(part.shape)} {part.dtype} on {part.device}: accepted are "
                    f"({count},) {scales.dtype} on {codes.device}"
                )
        made: Int8Weight = torch.Tensor._make_wrapper_subclass(
            cls,
            codes.shape,
            dtype=scales.dtype,
            device=codes.device,
            requires_grad=requires_grad,
        )
        made.codes, made.scales, made.zeros = codes, scales, zeros
        made.group_size = group_size
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing; see `__new__`."""

    @classmethod
    def quantize(cls, dense: Tensor, group_size: int = groups.DEFAULT_GROUP) -> Int8Weight:
        """Rounds a floating-point matrix of any strides to the nearest codes."""
        return cls(*groups.quantize_groups(dense, 255, group_size), group_size)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """A dense copy, in the apparent dtype unless another is given; no gradient flows to it."""
        return groups.dequantize_groups(
            self.codes, self.scales, self.zeros, self.group_size, dtype or self.scales.dtype
        )

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes that are stored: codes, scales and zero points."""
        return sum(part.nbytes for part in self.parts())

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, scales and zero points."""
        return self.codes, self.scales, self.zeros

    def assign(self, dense: Tensor) -> None:
        """In place: rounds `dense` to the nearest codes; groups with equal values are unchanged.

        Args:
            dense: same shape, any floating dtype and device.
        """
        source = dense.detach().to(self.device).reshape(-1)
        for start, stop, _ in groups.spans(self.codes.numel(), self.group_size, self.device):
            chunk = self.entries(start, stop)
            chunk.store(source[start:stop], chunk.load(self.dtype))

    def entries(self, start: int, stop: int) -> Chunk:
        """The flattened entries [start, stop), which must be whole groups."""
        span = slice(start // self.group_size, -(-stop // self.group_size))
        codes = self.codes.view(-1)[start:stop]
        return Chunk(codes, self.scales[span], self.zeros[span], self.group_size)

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        return (
            f"Int8Weight(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device}, "
            f"group_size={self.group_size}, requires_grad={self.requires_grad})"
        )

    # Copies

    def _like(self, parts: Iterable[Tensor]) -> Int8Weight:
        return Int8Weight(*parts, group_size=self.group_size)

    def __deepcopy__(self, memo: dict[int, Any]) -> Int8Weight:
        if id(self) not in memo:
            codes, scales, zeros = (part.clone() for part in self.parts())
            is_parameter = isinstance(self, nn.Parameter)
            copied = rebuild_int8_weight(
                codes, scales, zeros, self.group_size, self.requires_grad, is_parameter
            )
            memo[id(self)] = copied
            copied.grad = copy.deepcopy(self.grad, memo)
        found: Int8Weight = memo[id(self)]
        return found

    def __reduce_ex__(self, protocol: object) -> tuple[Callable[..., Int8Weight], tuple[Any, ...]]:
        arguments = (self.group_size, self.requires_grad, isinstance(self, nn.Parameter))
        return rebuild_int8_weight, (*self.parts(), *arguments)

    def __tensor_flatten__(self) -> tuple[list[str], int]:
        return list(_INNER), self.group_size

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], group_size: int, size: object, stride: object
    ) -> Int8Weight:
        return Int8Weight(*(inner[name] for name in _INNER), group_size=group_size)

    # Operations

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.linear:
            named = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
            if isinstance(named["weight"], Int8Weight):
                return int8_linear(named["input"], named["weight"], named.get("bias"))
        with torch._C.DisableTorchFunctionSubclass():
            if func == _SET_DATA:
                return _set_data(*args)
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _HANDLERS:
            handled = _HANDLERS[func](func, args, kwargs)
            if handled is not NotImplemented:
                return handled
        _refuse_writes(func, args, kwargs)
        dense = torch.utils._pytree.tree_map_only(Int8Weight, Int8Weight.dequantize, (args, kwargs))
        return func(*dense[0], **dense[1])


class Chunk:
    """Whole groups of an `Int8Weight`, for reading and writing.

    Args:
        codes: (k,), a view of the weight's.
        scales: one a group, a view.
        zeros: one a group, a view.
        group_size: of the weight.
    """

    def __init__(self, codes: Tensor, scales: Tensor, zeros: Tensor, group_size: int) -> None:
        self.codes, self.scales, self.zeros = codes, scales, zeros
        self.group_size = group_size

    def load(self, dtype: torch.dtype) -> Tensor:
        """The entries, flat and dense."""
        return groups.dequantize_groups(self.codes, self.scales, self.zeros, self.group_size, dtype)

    def store(self, new: Tensor, old: Tensor, seed: int | None = None, first: int = 0) -> None:
        """Requantises the groups in which `new` differs from `old`, with their own new ranges.

        Args:
            new: flat entries.
            old: the entries before, as `load` gave them.
            seed: rounds stochastically when given.
            first: position of the first entry in the whole matrix, for the noise.
        """
        store_changed(
            *(new, old, self.codes, self.scales, self.zeros, self.group_size),
            *(signed_seed(seed), first),
        )


def rebuild_int8_weight(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    group_size: int,
    requires_grad: bool,
    is_parameter: bool,
) -> Int8Weight:
    """Restores a weight from a pickle or copy."""
    made = Int8Weight(codes, scales, zeros, group_size, requires_grad)
    return nn.Parameter(made, requires_grad) if is_parameter else made  # type: ignore[return-value]


torch.serialization.add_safe_globals([rebuild_int8_weight])


def _set_data(weight: Tensor, value: Tensor) -> None:
    """Implements `weight.data = value`."""
    if not isinstance(weight, Int8Weight):
        weight.data = value.dequantize() if isinstance(value, Int8Weight) else value
        return
    same = (value.shape, value.dtype, value.device) == (weight.shape, weight.dtype, weight.device)
    if not same:
        raise ValueError(
            f"data of shape {tuple(value.shape)}, {value.dtype} on {value.device} for an INT8 "
            f"weight of shape {tuple(weight.shape)}, {weight.dtype} on {weight.device}: accepted "
            "are the same; module.to(...) moves and casts"
        )
    if isinstance(value, Int8Weight) and value.group_size == weight.group_size:
        weight.codes, weight.scales, weight.zeros = value.parts()
    else:
        weight.assign(value)


def _refuse_writes(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Raises for operations that would write into an INT8 weight."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        for item in value if isinstance(value, list | tuple) else (value,):
            if isinstance(item, Int8Weight):
                raise ValueError(
                    f"{func} would change an INT8 weight in place: accepted are copy_ and the "
                    "optimizers of this package; merge(model) makes weights dense"
                )


# Operations that keep the representation


def _alias(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    weight = args[0]
    return weight._like(weight.parts())


def _clone(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    weight = args[0]
    return weight._like(part.clone() for part in weight.parts())


def _to(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    weight = args[0]
    dtype = kwargs.get("dtype") or weight.dtype
    if not dtype.is_floating_point:
        return NotImplemented
    place = {name: kwargs.get(name) for name in ("device", "non_blocking")}
    place = {name: value for name, value in place.items() if value is not None}
    codes, *others = weight.parts()
    return weight._like(
        (codes.to(copy=True, **place), *(t.to(dtype=dtype, copy=True, **place) for t in others))
    )


def _empty_like(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """INT8 for `Module.to_empty`, which passes a device; dense for other callers."""
    weight = args[0]
    if kwargs.get("device") is None or kwargs.get("dtype") not in (None, weight.dtype):
        return NotImplemented
    return weight._like(torch.empty_like(t, device=kwargs["device"]) for t in weight.parts())


def _copy(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    weight, source = args[0], args[1]
    if not isinstance(weight, Int8Weight):
        return NotImplemented
    same = isinstance(source, Int8Weight) and source.group_size == weight.group_size
    if same and source.shape == weight.shape:
        for target, value in zip(weight.parts(), source.parts(), strict=True):
            target.copy_(value)
    else:
        dense = source.dequantize() if isinstance(source, Int8Weight) else source
        weight.assign(dense.expand(weight.shape))
    # Not counted below autograd, but a pending backward pass must detect the change.
    torch.autograd.graph.increment_version(weight.parts())
    return weight


_HANDLERS: dict[Any, Callable[[Any, Sequence[Any], dict[str, Any]], Any]] = {
    aten.detach.default: _alias,
    aten.alias.default: _alias,
    aten.clone.default: _clone,
    aten._to_copy.default: _to,
    aten.empty_like.default: _empty_like,
    aten.copy_.default: _copy,
}
