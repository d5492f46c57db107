"""Fake tensors of a GPU with a torch that is built without CUDA.

Its Python methods that index and copy ask the driver which GPU is current, even for fake tensors.
Here they are replaced by the operations that they end in.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

_aten = torch.ops.aten


@contextlib.contextmanager
def driverless(device: torch.device) -> Iterator[None]:
    """Lets fake tensors on this device be indexed and copied, whatever torch is built for."""
    if device.type != "cuda" or torch.version.cuda is not None:
        yield
        return
    with contextlib.ExitStack() as stack:
        for name, made in (
            ("__getitem__", _picked),
            ("__setitem__", _set),
            ("contiguous", _contiguous),
            ("copy_", _aten.copy_.default),
            ("item", _item),
            ("__invert__", _aten.bitwise_not.default),
            ("__bool__", lambda tensor: bool(_item(tensor))),
            ("__float__", lambda tensor: float(_item(tensor))),
            ("__int__", lambda tensor: int(_item(tensor))),
        ):
            former = getattr(Tensor, name)
            stack.enter_context(mock.patch.object(Tensor, name, _on_gpu(made, former)))
        yield


def _on_gpu(made: Callable[..., Any], former: Callable[..., Any]) -> Callable[..., Any]:
    def method(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (made if tensor.is_cuda else former)(tensor, *args, **kwargs)

    return method


def _item(tensor: Tensor) -> Any:
    return _aten._local_scalar_dense.default(tensor)


def _contiguous(tensor: Tensor, **_: Any) -> Tensor:
    if tensor.is_contiguous():
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _viewed(tensor: Tensor, index: Any) -> tuple[Tensor, list[Tensor | None]]:
    """What slices and numbers select, and what else is to be picked of it."""
    items = index if isinstance(index, tuple) else (index,)
    used = sum(_width(item) for item in items if item is not None and item is not Ellipsis)
    view, axis = tensor, 0
    picks: dict[int, Tensor] = {}
    for item in items:
        if item is None:
            view, axis = view.unsqueeze(axis), axis + 1
        elif item is Ellipsis:
            axis += tensor.dim() - used
        elif isinstance(item, slice):
            if item != slice(None):
                start, stop, step = item.indices(view.shape[axis])
                view = _aten.slice.Tensor(view, axis, start, stop, step)
            axis += 1
        elif isinstance(item, Tensor) and item.dim():
            picks[axis] = item
            axis += _width(item)
        elif isinstance(item, list):
            picks[axis] = torch.empty(len(item), dtype=torch.int64, device=tensor.device)
            axis += 1
        else:
            view = view.select(axis, int(item))
    found = [picks.get(position) for position in range(max(picks, default=-1) + 1)]
    return view, found


def _width(item: Any) -> int:
    return item.dim() if isinstance(item, Tensor) and item.dtype == torch.bool else 1


def _picked(tensor: Tensor, index: Any) -> Tensor:
    view, picks = _viewed(tensor, index)
    found: Tensor = _aten.index.Tensor(view, picks) if picks else view
    return found


def _set(tensor: Tensor, index: Any, value: Any) -> None:
    view, picks = _viewed(tensor, index)
    if not isinstance(value, Tensor):
        value = torch.full((), value, dtype=tensor.dtype, device=tensor.device)
    if picks:
        _aten.index_put_.default(view, picks, value)
    else:
        view.copy_(value)
