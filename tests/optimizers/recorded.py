"""A step recorded and replayed on a CPU as a CUDA graph would be: operations on fixed addresses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: Operations that need a number on the host, or whose results' sizes depend on data.
READING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim"}
READING |= {"is_nonzero", "equal"}


class Recorded(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records operations; numbers that are no tensors are those of the recording ever after.

    Raises:
        AssertionError: an operation reads a number, or has results of a size that depends on data.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs an operation and keeps it, with its tensors."""
        name = func._schema.name.rpartition("::")[2]
        masks = [leaf for leaf in tree_leaves(args[1:]) if isinstance(leaf, Tensor)]
        masked = name.startswith("index") and any(mask.dtype == torch.bool for mask in masks)
        assert name not in READING, f"{name} reads a number"
        assert not masked, f"{name} by a mask has a size that depends on data"
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        """Runs all again, from and into the same memory."""
        for func, args, kwargs, out in self.calls:
            if func.is_view or "empty" in func._schema.name:
                continue
            again = func(*args, **kwargs)
            for target, value in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(target, Tensor) and target.data_ptr() != value.data_ptr():
                    target.copy_(value)
