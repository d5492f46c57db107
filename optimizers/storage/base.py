"""How a basis is kept between steps: the third seam of a method, behind it plain tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class BasisStorage(ABC):
    """Stores one basis of shape d x r under `key` in a parameter's flat state.

    Keys begin with `key`, so that all of them count as the basis's memory.
    """

    #: Options that a group may set: the names of this class's fields.
    OPTIONS: ClassVar[tuple[str, ...]] = ()
    #: Whether a basis is read as it was written, but for its dtype's rounding.
    exact: ClassVar[bool] = True

    @abstractmethod
    def init(self, key: str, shape: tuple[int, int], like: Tensor) -> dict[str, Tensor]:
        """State entries of a basis not fitted yet: zero, so that it projects to zero."""

    @abstractmethod
    def write(self, state: Mapping[str, Any], key: str, basis_dr: Tensor) -> None:
        """Stores a basis into the entries that `init` made."""

    @abstractmethod
    def read(self, state: Mapping[str, Any], key: str) -> Tensor:
        """The stored basis, d x r; a view where the storage allows it."""

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
        """Copies, so that the state never pins the storage of a whole factor."""
        state[key].copy_(basis_dr)

    def read(self, state: Mapping[str, Any], key: str) -> Tensor:
        """The stored tensor itself."""
        basis: Tensor = state[key]
        return basis

    def state_bytes(self, shape: tuple[int, int], itemsize: int) -> int:
        """D r entries of `dtype`, or of the parameter's size."""
        return shape[0] * shape[1] * (self.dtype.itemsize if self.dtype else itemsize)
