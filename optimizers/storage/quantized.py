"""Bases in four or eight bits (Q-GaLore, arXiv 2407.08296, section 3.2).

A basis of d x r entries is quantised in groups of `quant_group_size` entries, each with a scale and
(asymmetric) a zero point in the parameter's precision; see `lowrank.cuda.groups` and `.int4` for
the formulas. It is flattened as in the official code: a left basis row by row, a right one
singular vector by singular vector. The dequantised basis is orthonormal only to the precision of
the codes (5 % in four bits); as there, both projection and back-projection use it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowrank.cuda import groups, int4

from ..engine import checks
from ..engine.geometry import Side
from .base import BasisStorage


@dataclass(frozen=True)
class QuantizedBasis(BasisStorage):
    """Base of the group-quantised storages: the order of entries and the state keys.

    Under `key`: the codes; with suffixes: "_scales", (asymmetric) "_zeros", and the integers
    "_rows" and "_columns", d and r.

    Attributes:
        quant_group_size: entries that share a scale; the last group may have fewer.
    """

    OPTIONS: ClassVar[tuple[str, ...]] = ("quant_group_size",)
    exact: ClassVar[bool] = False

    quant_group_size: int = groups.DEFAULT_GROUP

    def __post_init__(self) -> None:
        checks.integer("quant_group_size", self.quant_group_size, low=1)

    def init(self, key: str, shape: tuple[int, int], like: Tensor) -> dict[str, Any]:
        """Zeroed storage, which reads as zeros."""
        entries: dict[str, Any] = self._empty(key, shape[0] * shape[1], like)
        return entries | {f"{key}_rows": shape[0], f"{key}_columns": shape[1]}

    def write(self, state: Mapping[str, Any], key: str, basis_dr: Tensor) -> None:
        """Quantises to the nearest codes."""
        ordered = basis_dr.mT if _by_vector(state, key) else basis_dr
        self._quantize(state, key, ordered.contiguous())

    def read(self, state: Mapping[str, Any], key: str) -> Tensor:
        """The dequantised basis, d x r, a new tensor in the precision of the scales."""
        rows, columns = state[f"{key}_rows"], state[f"{key}_columns"]
        flat = self._dequantize(state, key, rows * columns)
        if _by_vector(state, key):
            return flat.view(columns, rows).mT
        return flat.view(rows, columns)

    def read_together(self, states: Sequence[Mapping[str, Any]], key: str) -> list[Tensor]:
        """See `BasisStorage.read_together`: by list operations."""
        rows, columns = states[0][f"{key}_rows"], states[0][f"{key}_columns"]
        flat_b = states[0][f"{key}_scales"].new_empty(len(states), rows * columns)
        flats = list(flat_b.unbind(0))
        names = (key, f"{key}_scales", f"{key}_zeros")
        codes, scales, zeros = ([s[name] for s in states if name in s] for name in names)
        self._dequantize_list(codes, scales, zeros, flats)
        if _by_vector(states[0], key):
            return [flat.view(columns, rows).mT for flat in flats]
        return [flat.view(rows, columns) for flat in flats]

    def scratch_entries(self, shape: tuple[int, int]) -> int:
        """All of them."""
        return shape[0] * shape[1]

    def tensors(self, state: Mapping[str, Any], key: str) -> list[Tensor]:
        """Codes, scales and (asymmetric) zero points."""
        return [state[name] for name in (key, f"{key}_scales", f"{key}_zeros") if name in state]

    @abstractmethod
    def _empty(self, key: str, numel: int, like: Tensor) -> dict[str, Any]: ...

    @abstractmethod
    def _quantize(self, state: Mapping[str, Any], key: str, ordered: Tensor) -> None: ...

    @abstractmethod
    def _dequantize(self, state: Mapping[str, Any], key: str, numel: int) -> Tensor: ...

    @abstractmethod
    def _dequantize_list(
        self, codes: list[Tensor], scales: list[Tensor], zeros: list[Tensor], outs: list[Tensor]
    ) -> None: ...


def _by_vector(state: Mapping[str, Any], key: str) -> bool:
    """Whether entries are ordered by singular vector: on the right."""
    return state["side"] == Side.RIGHT or key.endswith("_right")


@dataclass(frozen=True)
class Int4Basis(QuantizedBasis):
    """Two entries a byte.

    Memory: ceil(d r / 2) bytes, and for each group a scale and (asymmetric) a zero point.

    Attributes:
        quant_format: "asymmetric" (official), "midrise" or "nf4", see `lowrank.cuda.int4`.
    """

    OPTIONS: ClassVar[tuple[str, ...]] = ("quant_group_size", "quant_format")

    quant_format: str = "asymmetric"

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.choice("quant_format", self.quant_format, int4.FORMATS)

    def state_bytes(self, shape: tuple[int, int], itemsize: int) -> int:
        """Codes, scales and (asymmetric) zero points."""
        per_group = 2 if self.quant_format == "asymmetric" else 1
        numel = shape[0] * shape[1]
        return groups.group_bytes(numel, 4, self.quant_group_size, itemsize, per_group)

    def _empty(self, key: str, numel: int, like: Tensor) -> dict[str, Any]:
        packed = int4.empty_int4(
            numel, self.quant_format, self.quant_group_size, like.dtype, like.device
        )
        named = {key: packed.codes, f"{key}_scales": packed.scales, f"{key}_zeros": packed.zeros}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def _quantize(self, state: Mapping[str, Any], key: str, ordered: Tensor) -> None:
        int4.quantize_int4(
            ordered, self.quant_format, self.quant_group_size, out=self._packed(state, key)
        )

    def _dequantize(self, state: Mapping[str, Any], key: str, numel: int) -> Tensor:
        return int4.dequantize_int4(
            self._packed(state, key), numel, self.quant_format, self.quant_group_size
        )

    def _dequantize_list(
        self, codes: list[Tensor], scales: list[Tensor], zeros: list[Tensor], outs: list[Tensor]
    ) -> None:
        torch.ops.lowrank.dequantize_int4_list(
            codes, scales, zeros, outs, self.quant_format, self.quant_group_size
        )

    @staticmethod
    def _packed(state: Mapping[str, Any], key: str) -> int4.Packed:
        return int4.Packed(state[key], state[f"{key}_scales"], state.get(f"{key}_zeros"))


@dataclass(frozen=True)
class Int8Basis(QuantizedBasis):
    """One entry a byte, to the nearest of 256 levels.

    Memory: d r bytes, and for each group a scale and a zero point.
    """

    def state_bytes(self, shape: tuple[int, int], itemsize: int) -> int:
        """Codes, scales and zero points."""
        return groups.group_bytes(shape[0] * shape[1], 8, self.quant_group_size, itemsize)

    def _empty(self, key: str, numel: int, like: Tensor) -> dict[str, Any]:
        count = groups.group_count(numel, self.quant_group_size)
        return {
            key: torch.zeros(numel, dtype=torch.uint8, device=like.device),
            f"{key}_scales": torch.zeros(count, dtype=like.dtype, device=like.device),
            f"{key}_zeros": torch.zeros(count, dtype=like.dtype, device=like.device),
        }

    def _quantize(self, state: Mapping[str, Any], key: str, ordered: Tensor) -> None:
        groups.quantize_groups(
            ordered.view(-1), 255, self.quant_group_size, out=self._parts(state, key)
        )

    def _dequantize(self, state: Mapping[str, Any], key: str, numel: int) -> Tensor:
        return groups.dequantize_groups(*self._parts(state, key), self.quant_group_size)

    def _dequantize_list(
        self, codes: list[Tensor], scales: list[Tensor], zeros: list[Tensor], outs: list[Tensor]
    ) -> None:
        torch.ops.lowrank.dequantize_groups_list(codes, scales, zeros, outs, self.quant_group_size)

    @staticmethod
    def _parts(state: Mapping[str, Any], key: str) -> tuple[Tensor, Tensor, Tensor]:
        return state[key], state[f"{key}_scales"], state[f"{key}_zeros"]
