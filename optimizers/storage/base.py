"""The storage interface: how a basis is stored between steps, as plain tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class BasisStorage(ABC):
    """Stores one basis of shape d x r under `key` in a parameter's flat state.

    All keys begin with `key`, so that they count as the basis's memory.
    """

    #: Options that a group may set: the names of this class's fields.
    OPTIONS: ClassVar[tuple[str, ...]] = ()
    #: Whether a basis is stored exactly, up to rounding to its dtype.
    exact: ClassVar[bool] = True

    @abstractmethod
    def init(self, key: str, shape: tuple[int, int], like: Tensor) -> dict[str, Tensor]:
        """State entries of a basis that is not fitted yet: zeros."""

    @abstractmethod
    def write(self, state: Mapping[str, Any], key: str, basis_dr: Tensor) -> None:
        """Stores a basis into the entries that `init` made."""

    @abstractmethod
    def read(self, state: Mapping[str, Any], key: str) -> Tensor:
        """The stored basis, d x r; a view where the storage allows it."""

    def read_together(self, states: Sequence[Mapping[str, Any]], key: str) -> list[Tensor]:
        """The stored bases of B matrices of one geometry."""
        return [self.read(state, key) for state in states]

    def scratch_entries(self, shape: tuple[int, int]) -> int:
        """Entries of the copy that `read` makes of a basis, if it does."""
        return 0

    @abstractmethod
    def tensors(self, state: Mapping[str, Any], key: str) -> list[Tensor]:
        """The tensors that hold one basis: a copy of all of them is a copy of the basis."""

    @abstractmethod
    def state_bytes(self, shape: tuple[int, int], itemsize: int) -> int:
        """Bytes of one basis, for parameters of `itemsize` bytes an entry."""


@dataclass(frozen=True)
class DenseBasis(BasisStorage):
    """A basis in the parameter's precision, or in `dtype` where one is given.

    Memory: d r entries.
    """

    dtype: torch.dtype | None = None

    def init(self, key: str, shape: tuple[int, int], like: Tensor) -> dict[str, Tensor]:
        """One zero tensor of the given shape on the parameter's device."""
        return {key: torch.zeros(shape, dtype=self.dtype or like.dtype, device=like.device)}

    def write(self, state: Mapping[str, Any], key: str, basis_dr: Tensor) -> None:
        """Copies, so that the state never keeps the storage of a whole factor alive."""
        state[key].copy_(basis_dr)

    def read(self, state: Mapping[str, Any], key: str) -> Tensor:
        """The stored tensor itself."""
        basis: Tensor = state[key]
        return basis

    def tensors(self, state: Mapping[str, Any], key: str) -> list[Tensor]:
        """The one that `init` made."""
        return [state[key]]

    def state_bytes(self, shape: tuple[int, int], itemsize: int) -> int:
        """Bytes of d r entries, of `dtype` or else of the parameter's size."""
        return shape[0] * shape[1] * (self.dtype.itemsize if self.dtype else itemsize)
