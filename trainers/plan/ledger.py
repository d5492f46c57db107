"""A record of the memory that tensor operations allocate, of real tensors or of fake ones.

Under `FakeTensorMode` nothing is allocated, yet each operation makes tensors with storages of the
right sizes, which live and die as the real ones would. So the code that trains can be run to find
out what it would need.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    is_traceable_wrapper_subclass_type,
)
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from .workspace import workspace_bytes

_aten = torch.ops.aten
_NONZERO, _DRAW = _aten.nonzero.default, _aten.multinomial.default
_INDEXING = (_aten.index.Tensor, _aten.index_put_.default)
_RANGES = (_aten.arange.default, _aten.arange.start, _aten.arange.start_step)
_CREATING = (_aten.ones.default, _aten.zeros.default, _aten.full.default, *_RANGES)
#: Entries of host tensors whose values are followed.
_SMALL = 1 << 16
_READ = _aten._local_scalar_dense.default
_DEVICE = torch.ops.prim.device.default
_COMPARISONS = {getattr(_aten, name).__name__ for name in ("lt", "gt", "le", "ge", "ne", "eq")}


@dataclass
class Level:
    """Bytes at one moment.

    Attributes:
        total: all of them.
        parts: by category.
    """

    total: int = 0
    parts: Counter[str] = field(default_factory=Counter)

    def copy(self) -> Level:
        """An independent one."""
        return Level(self.total, Counter(self.parts))


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all storages that operations inside of it make, while they live.

    A storage counts once, however many tensors share it, and is of the category that is set when it
    is made. What kernels allocate for themselves is added for operations that `workspace` knows.

    What the code reads back of fake tensors has no value. Values of `known` tensors are computed
    beside the fake ones; else a number is 1, a comparison false, and another flag, such as whether
    everything is finite, true.

    Args:
        granularity: bytes to a multiple of which an allocator rounds up.
        category: of new storages.
    """

    def __init__(self, granularity: int = 1, category: str = "other") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.category = category
        self.now = Level()
        self.peak = Level()
        self._granularity = granularity
        self._sizes: dict[int, tuple[Any, str, int]] = {}
        self._values: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._compared: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def hold(self, tensors: Iterable[Tensor], category: str) -> None:
        """Counts tensors that exist already."""
        for tensor in tensors:
            for inner in _plain(tensor):
                self._add(inner, category)
        self.restart()

    def move(self, tensor: Tensor, category: str) -> None:
        """Gives a tensor's storage another category."""
        for inner in _plain(tensor):
            key = id(inner.untyped_storage())
            if key in self._sizes:
                reference, former, size = self._sizes[key]
                self._sizes[key] = (reference, category, size)
                self.now.parts[former] -= size
                self.now.parts[category] += size

    def restart(self) -> None:
        """Forgets the peak so far."""
        self.peak = self.now.copy()

    def know(self, tensor: Tensor, value: float | range) -> None:
        """Gives the entries of a fake tensor one value or several, which operations change."""
        with _disable_current_modes():
            if isinstance(value, range):
                self._values[tensor] = torch.tensor(value, dtype=tensor.dtype)
            else:
                self._values[tensor] = torch.full(tensor.shape, value, dtype=tensor.dtype)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs an operation and counts what it makes."""
        if func is _DEVICE and type(args[0]) is FakeTensor:  # half of all operations
            fake = args[0]
            return func(fake) if fake.fake_mode.in_kernel_invocation else fake.fake_device
        if any(_wraps(kind) for kind in types):
            return NotImplemented  # its own operations on what it wraps come here
        if func is _DEVICE:
            return func(*args)
        kwargs = kwargs or {}
        if func is _READ:
            return self._read(args[0])
        values = self._values_of(func, args, kwargs)
        if func is _NONZERO:
            out = torch.empty(
                self._found(args[0], values), dtype=torch.int64, device=args[0].device
            )
        else:
            out = func(*_without_masks(func, args), **kwargs)
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        for tensor in made:
            self._add(tensor, self.category)
        hidden = workspace_bytes(func, args, kwargs)
        if hidden:
            self.rise(hidden, self.category)
        self._keep(func, made, values)
        if _compares(func):
            for tensor in made:
                if tensor.dim() == 0:
                    self._compared[tensor] = True
        return out

    def _add(self, tensor: Tensor, category: str) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._sizes:
            return
        step = self._granularity
        size = -(-storage.nbytes() // step) * step
        self._sizes[key] = (weakref.ref(storage, self._dropper(key)), category, size)
        self.now.total += size
        self.now.parts[category] += size
        if self.now.total > self.peak.total:
            self.peak = self.now.copy()

    def _dropper(self, key: int) -> Callable[[Any], None]:
        def drop(_: Any) -> None:
            _, category, size = self._sizes.pop(key)
            self.now.total -= size
            self.now.parts[category] -= size

        return drop

    def rise(self, size: int, category: str) -> None:
        """Counts bytes that are allocated and freed at once."""
        if self.now.total + size > self.peak.total:
            self.peak = self.now.copy()
            self.peak.total += size
            self.peak.parts[category] += size

    def _read(self, tensor: Tensor) -> Any:
        """The value of a tensor that has one, or a plausible one."""
        if tensor in self._values:
            with _disable_current_modes():
                return self._values[tensor].item()
        constant = getattr(tensor, "constant", None)
        if constant is not None:
            return constant.item()
        if not torch._subclasses.fake_tensor.is_fake(tensor):
            return tensor.item()
        if tensor.dtype == torch.bool:
            return tensor not in self._compared
        return 1.0 if tensor.is_floating_point() else 1

    def _values_of(self, func: Any, args: Any, kwargs: dict[str, Any]) -> list[Any]:
        """What an operation makes of known values; nothing if any is unknown."""
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not given:
            return _created(func, args, kwargs)
        known = [tensor in self._values for tensor in given] if self._values else [False]
        if not all(known):
            if func._schema.is_mutable:
                for tensor in given:
                    self._values.pop(tensor, None)  # type: ignore[no-untyped-call]
            return []
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        own = tree_map_only(Tensor, lambda tensor: self._values[tensor], (args, kwargs))
        with _disable_current_modes():
            return tree_leaves(func(*own[0], **own[1]))

    def _keep(self, func: Any, made: list[Tensor], values: list[Any]) -> None:
        if func is _DRAW:  # distinct positions, whichever
            for tensor in made:
                self.know(tensor, range(tensor.shape[-1]))
        for tensor, value in zip(made, (v for v in values if isinstance(v, Tensor)), strict=False):
            if tensor not in self._values:
                self._values[tensor] = value

    def _found(self, mask: Tensor, values: list[Any]) -> tuple[int, int]:
        """The shape of nonzero positions: of known entries, or all of them."""
        if values:
            rows, columns = values[0].shape
            return int(rows), int(columns)
        return mask.numel(), mask.dim()


@cache
def _compares(func: Any) -> bool:
    return func._schema.name.rpartition("::")[2] in _COMPARISONS


def _created(func: Any, args: Any, kwargs: dict[str, Any]) -> list[Any]:
    """The small host tensor of integers or flags that an operation makes of nothing."""
    if func not in _CREATING or kwargs.get("dtype") not in (torch.bool, torch.int64):
        return []
    if torch.device(kwargs.get("device") or "cpu").type != "cpu":
        return []
    if func not in _RANGES and math.prod(args[0]) > _SMALL:
        return []
    with _disable_current_modes():
        return [func(*args, **kwargs)]


def _without_masks(func: Any, args: Any) -> Any:
    """Replaces masks that select rows, whose number fake ones don't tell, by all positions."""
    if func not in _INDEXING:
        return args
    indices = [
        torch.empty(index.numel(), dtype=torch.int64, device=index.device)
        if index is not None and index.dtype == torch.bool and index.dim() == 1
        else index
        for index in args[1]
    ]
    return (args[0], indices, *args[2:])


def _wraps(kind: type) -> bool:
    return bool(is_traceable_wrapper_subclass_type(kind))


def _plain(tensor: Tensor) -> list[Tensor]:
    """The tensors that hold a tensor's data."""
    if not _wraps(type(tensor)):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    return [inner for name in names for inner in _plain(getattr(tensor, name))]
