"""Operations on quantised weights below autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .quantized import QuantizedWeight

aten = torch.ops.aten


def run(kind: type[QuantizedWeight], func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """An operation, some of whose arguments are quantised weights.

    Args:
        kind: `QuantizedWeight`.
        func: the operation.
        args: its arguments.
        kwargs: its named arguments.

    Raises:
        ValueError: it would change one of them in place, other than by `copy_`.
    """
    if func in _HANDLERS:
        handled = _HANDLERS[func](kind, args, kwargs)
        if handled is not NotImplemented:
            return handled
    _refuse_writes(kind, func, args, kwargs)
    dense = torch.utils._pytree.tree_map_only(
        kind, lambda weight: weight.dequantize(), (args, kwargs)
    )
    return func(*dense[0], **dense[1])


def _refuse_writes(
    kind: type[QuantizedWeight], func: Any, args: Sequence[Any], kwargs: dict[str, Any]
) -> None:
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        for item in value if isinstance(value, list | tuple) else (value,):
            if isinstance(item, kind):
                raise ValueError(
                    f"{func} would change an INT{item.BITS} weight in place: accepted are copy_ "
                    "and the optimizers of this package; merge(model) makes weights dense"
                )


def _alias(kind: type[QuantizedWeight], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    weight = args[0]
    return weight.like(weight.parts())


def _clone(kind: type[QuantizedWeight], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    weight = args[0]
    return weight.like(part.clone() for part in weight.parts())


def _to(kind: type[QuantizedWeight], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    weight = args[0]
    dtype = kwargs.get("dtype") or weight.dtype
    if not dtype.is_floating_point:
        return NotImplemented
    place = {name: kwargs.get(name) for name in ("device", "non_blocking")}
    place = {name: value for name, value in place.items() if value is not None}
    codes, *others = weight.parts()
    return weight.like(
        (codes.to(copy=True, **place), *(t.to(dtype=dtype, copy=True, **place) for t in others))
    )


def _empty_like(kind: type[QuantizedWeight], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Quantised for `Module.to_empty`, which passes a device; dense for other callers."""
    weight = args[0]
    if kwargs.get("device") is None or kwargs.get("dtype") not in (None, weight.dtype):
        return NotImplemented
    return weight.like(torch.empty_like(t, device=kwargs["device"]) for t in weight.parts())


def _copy(kind: type[QuantizedWeight], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    weight, source = args[0], args[1]
    if not isinstance(weight, kind):
        return NotImplemented
    same = isinstance(source, type(weight)) and source.group_size == weight.group_size
    if same and source.shape == weight.shape:
        for target, value in zip(weight.parts(), source.parts(), strict=True):
            target.copy_(value)
    else:
        dense = source.dequantize() if isinstance(source, kind) else source
        weight.assign(dense.expand(weight.shape))
    # Not counted below autograd, but a pending backward pass must detect the change.
    torch.autograd.graph.increment_version(weight.parts())
    return weight


def _average(kind: type[QuantizedWeight], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """`torch._foreach_lerp_`: what the running averages of `torch.optim.swa_utils` do in place."""
    averages, values, rates = args[0], args[1], args[2]
    for index, (average, value) in enumerate(zip(averages, values, strict=True)):
        rate = rates[index] if isinstance(rates, list | tuple) else rates
        if isinstance(average, kind):
            average.lerp_towards(value, rate)
            torch.autograd.graph.increment_version(average.parts())
        else:
            average.lerp_(value.dequantize() if isinstance(value, kind) else value, rate)
    return None


_Handler = Callable[[Any, Sequence[Any], dict[str, Any]], Any]

_HANDLERS: dict[Any, _Handler] = {
    aten.detach.default: _alias,
    aten.alias.default: _alias,
    aten.clone.default: _clone,
    aten._to_copy.default: _to,
    aten.empty_like.default: _empty_like,
    aten.copy_.default: _copy,
    aten._foreach_lerp_.Scalar: _average,
    aten._foreach_lerp_.ScalarList: _average,
    aten._foreach_lerp_.List: _average,
}
