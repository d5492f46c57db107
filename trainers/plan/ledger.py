"""A record of the memory that tensor operations allocate, of real tensors or of fake ones.

Under `FakeTensorMode` nothing is allocated, yet each operation makes tensors with storages of the
right sizes, which live and die as the real ones would. So the code that trains can be run to find
out what it would need.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    is_traceable_wrapper_subclass_type,
)
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from .workspace import workspace_bytes

_READ = torch.ops.aten._local_scalar_dense.default
_COMPARISONS = {
    getattr(torch.ops.aten, name).__name__ for name in ("lt", "gt", "le", "ge", "ne", "eq")
}


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


class Ledger(TorchDispatchMode):
    """Counts the bytes of all storages that operations inside of it make, while they live.

    A storage counts once, however many tensors share it, and is of the category that is set when it
    is made. What kernels allocate for themselves is added for the operations that `workspace` knows.

    What the code reads back of fake tensors has no value. Values of `known` tensors are computed
    beside the fake ones; else a number is 1, a comparison false, and another flag, such as whether
    everything is finite, true.

    Args:
        granularity: bytes to a multiple of which an allocator rounds up.
        category: of new storages.
    """

    def __init__(self, granularity: int = 1, category: str = "other") -> None:
        super().__init__()
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

    def know(self, tensor: Tensor, value: float) -> None:
        """Gives all entries of a fake tensor a value, which operations on it change."""
        with _disable_current_modes():
            self._values[tensor] = torch.full(tensor.shape, value, dtype=tensor.dtype)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs an operation and counts what it makes."""
        if any(_wraps(kind) for kind in types):
            return NotImplemented  # its own operations on what it wraps come here
        kwargs = kwargs or {}
        if func is _READ:
            return self._read(args[0])
        out = func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        for tensor in made:
            self._add(tensor, self.category)
        hidden = workspace_bytes(func, args, kwargs, out)
        if hidden:
            self._rise(hidden)
        if self._values:
            self._follow(func, args, kwargs, out)
        if func._schema.name.rpartition("::")[2] in _COMPARISONS:
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

    def _rise(self, hidden: int) -> None:
        if self.now.total + hidden > self.peak.total:
            self.peak = self.now.copy()
            self.peak.total += hidden
            self.peak.parts[self.category] += hidden

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

    def _follow(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Computes an operation on known values, or forgets what it makes unknown."""
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        known = [tensor in self._values for tensor in given]
        if not any(known):
            return
        if not all(known):
            if func._schema.is_mutable:
                for tensor in given:
                    self._values.pop(tensor, None)
            return
        device = kwargs.get("device")
        if device is not None:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        own = tree_map_only(Tensor, lambda tensor: self._values[tensor], (args, kwargs))
        with _disable_current_modes():
            values = func(*own[0], **own[1])
        pairs = zip(tree_leaves(out), tree_leaves(values), strict=True)
        for tensor, value in pairs:
            if isinstance(tensor, Tensor) and tensor not in self._values:
                self._values[tensor] = value


def _wraps(kind: type) -> bool:
    return bool(is_traceable_wrapper_subclass_type(kind))


def _plain(tensor: Tensor) -> list[Tensor]:
    """The tensors that hold a tensor's data."""
    if not _wraps(type(tensor)):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    return [inner for name in names for inner in _plain(getattr(tensor, name))]
