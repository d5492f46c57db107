"""Entries or views of a quantised weight: writing into them would be lost, so it raises.

Of a dense tensor an index, a transpose or a chunk shares its memory; of a quantised one it is a
copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

#: Methods with the ending of those that write, which don't.
_HARMLESS = ("requires_grad_",)


#: Functions of torch and methods of tensors that give views.
_VIEWS = frozenset(
    (
        *("__getitem__", "__iter__", "t", "transpose", "swapaxes", "swapdims", "movedim"),
        *("moveaxis", "permute", "adjoint", "view", "view_as", "reshape", "reshape_as", "flatten"),
        *("unflatten", "ravel", "squeeze", "unsqueeze", "expand", "expand_as", "chunk", "split"),
        *("tensor_split", "hsplit", "vsplit", "split_with_sizes", "unbind", "narrow", "select"),
        *("diagonal", "unfold", "as_strided"),
    )
)
_TRANSPOSED = (Tensor.T, Tensor.mT, Tensor.H, Tensor.mH)
_VIEW_PROPERTIES = frozenset(found.__get__ for found in _TRANSPOSED)  # type: ignore[attr-defined]


def is_view(func: Callable[..., Any]) -> bool:
    """Whether a function gives views of a dense tensor."""
    name = getattr(func, "__name__", "")
    return name in _VIEWS or (name == "__get__" and func in _VIEW_PROPERTIES)


def lost_write(weight: Any) -> ValueError:
    """The error for a write into some entries of a quantised weight."""
    width = f"a weight in {weight.BITS} bits" if hasattr(weight, "BITS") else "a quantised weight"
    return ValueError(
        f"writing into entries of {width}, which has no dense memory: accepted is to dequantise, "
        "change and copy the whole weight (dense = weight.dequantize(); dense[0] = 0; "
        "weight.data.copy_(dense))"
    )


class ReadEntries(Tensor):
    """A dense copy of entries, or a view of one; what is computed from it is an ordinary tensor."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Raises `ValueError` where these entries would be written."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        writes = name.endswith("_") and not name.endswith("__") and name not in _HARMLESS
        target = args[0] if args and (writes or name == "__setitem__") else kwargs.get("out")
        if isinstance(target, ReadEntries):
            raise lost_write(target)
        with torch._C.DisableTorchFunctionSubclass():
            made = func(*args, **kwargs)
        viewed = is_view(func) and args and isinstance(args[0], ReadEntries)
        return entries_of(made) if viewed else made


def entries_of(made: Any) -> Any:
    """What a view of a quantised weight gives: with a gradient to follow, ordinary tensors."""
    if isinstance(made, tuple | list):
        return type(made)(map(entries_of, made))
    if isinstance(made, Iterator):
        return map(entries_of, made)
    if type(made) is not Tensor or made.requires_grad or torch.compiler.is_compiling():
        return made
    return cast(Tensor, made.as_subclass(ReadEntries))
