"""Entries that were read from a quantised weight: writing into them would be lost, so it raises."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

#: Methods with the ending of those that write, which don't.
_HARMLESS = ("requires_grad_",)


def lost_write(weight: Any) -> ValueError:
    """The error for a write into some entries of a quantised weight."""
    width = f"a weight in {weight.BITS} bits" if hasattr(weight, "BITS") else "a quantised weight"
    return ValueError(
        f"writing into entries of {width}, which has no dense memory: accepted is to dequantise, "
        "change and copy the whole weight (dense = weight.dequantize(); dense[0] = 0; "
        "weight.data.copy_(dense))"
    )


class ReadEntries(Tensor):
    """A dense copy of some entries; what is computed from it is an ordinary tensor."""

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
            return func(*args, **kwargs)


def entries_of(weight: Tensor, made: Any) -> Any:
    """What indexing of a quantised weight gives: with a gradient to follow, an ordinary tensor."""
    if type(made) is not Tensor or made.requires_grad or torch.compiler.is_compiling():
        return made
    return cast(Tensor, made.as_subclass(ReadEntries))
