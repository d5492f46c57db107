"""How a matrix is stored in eight or in four bits: codes and scales of groups of entries.

A matrix is read row by row as one flat row and cut into groups of `group_size` entries, of which
the last one may be shorter.

- Eight bits: a code a byte, and for each group a scale and a zero point (`lowrank.cuda.groups`).
- Four bits: two codes a byte, and for each group a scale (`lowrank.cuda.int4_update`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from lowrank.cuda import groups, int4, int4_update
from lowrank.cuda.noise import Seed, signed_seed
from lowrank.cuda.write_back import store_changed

Parts = Sequence[Tensor]


@dataclass(frozen=True)
class Format(ABC):
    """The layout of one quantised matrix.

    Attributes:
        shape: of the matrix.
        group_size: entries that share a scale.
    """

    shape: tuple[int, ...]
    group_size: int

    BITS: ClassVar[int]
    #: Names of the tensors that hold it; codes first.
    PARTS: ClassVar[tuple[str, ...]]

    @property
    def numel(self) -> int:
        """Entries of the matrix."""
        return prod(self.shape)

    @property
    @abstractmethod
    def codes_shape(self) -> tuple[int, ...]:
        """Shape of the codes."""

    @classmethod
    def bytes(cls, numel: int, group_size: int, itemsize: int) -> int:
        """Bytes of a matrix of `numel` entries, its apparent dtype having `itemsize` bytes."""
        return groups.group_bytes(numel, cls.BITS, group_size, itemsize, len(cls.PARTS) - 1)

    def check(self, parts: Parts) -> None:
        """Raises `ValueError` for parts that don't fit together."""
        codes, scales = parts[0], parts[1]
        if codes.dtype != torch.uint8 or not codes.is_contiguous():
            raise ValueError(f"codes are {codes.dtype}: accepted are contiguous uint8")
        if codes.shape != self.codes_shape:
            raise ValueError(f"codes are {tuple(codes.shape)}: accepted are {self.codes_shape}")
        count = groups.group_count(self.numel, self.group_size)
        for name, part in zip(self.PARTS[1:], parts[1:], strict=True):
            if part.shape != (count,) or part.dtype != scales.dtype or part.device != codes.device:
                raise ValueError(
                    f"{name} are {tuple(part.shape)} {part.dtype} on {part.device}: accepted are "
                    f"({count},) {scales.dtype} on {codes.device}"
                )

    def dense(self, parts: Parts, dtype: torch.dtype) -> Tensor:
        """The matrix, dequantised."""
        out = torch.empty(self.shape, dtype=dtype, device=parts[0].device)
        self.read(parts, out.view(-1))
        return out

    @abstractmethod
    def read(self, parts: Parts, out: Tensor) -> None:
        """Dequantises entries, from the first of a group on, into a flat tensor."""

    @abstractmethod
    def encode(self, dense: Tensor) -> list[Tensor]:
        """Rounds a matrix of any strides to the nearest codes."""

    @abstractmethod
    def store(
        self, parts: Parts, new: Tensor, old: Tensor, seed: Seed | None, first: int, turn: Seed
    ) -> None:
        """Writes groups in which flat `new` and `old` differ; see `Chunk.store`."""

    def part(self, parts: Parts, start: int, stop: int) -> list[Tensor]:
        """Views of the flat entries [start, stop), which must be whole groups."""
        span = slice(start // self.group_size, -(-stop // self.group_size))
        per_byte = 8 // self.BITS
        codes = parts[0].view(-1)[start // per_byte : -(-stop // per_byte)]
        return [codes, *(part[span] for part in parts[1:])]

    def rows_at(self, parts: Parts, indices: Tensor, dtype: torch.dtype) -> Tensor:
        """Some rows, dequantised.

        Args:
            parts: of a V x n matrix.
            indices: integers below V, of any shape.
            dtype: of the result.

        Returns:
            (..., n).
        """
        rows, width = self.shape
        chosen = indices.reshape(-1)
        shape = (*indices.shape, width)
        if width % self.group_size == 0 and width * self.BITS % 8 == 0:
            own = [part.view(rows, -1).index_select(0, chosen) for part in parts]
            found = own[0] if self.BITS == 8 else own[0].view(-1)
            gathered = type(self)((len(chosen), width), self.group_size)
            return gathered.dense([found, *(p.view(-1) for p in own[1:])], dtype).view(shape)
        # Rows begin within groups, or within bytes: each entry reads its own.
        device = parts[0].device
        starts = torch.arange(rows, device=device).mul_(width).index_select(0, chosen)
        places = (starts.unsqueeze(1) + torch.arange(width, device=device)).view(-1)
        own = [part[places // self.group_size] for part in parts[1:]]
        single = type(self)((len(places), 1), 1)
        return single.dense([self._codes_at(parts[0], places), *own], dtype).view(shape)

    @abstractmethod
    def _codes_at(self, codes: Tensor, places: Tensor) -> Tensor:
        """Codes of flat entries, as a column of a matrix has them."""


class Format8(Format):
    """A code a byte; q is read as s (q - z)."""

    BITS = 8
    PARTS = ("codes", "scales", "zeros")

    @property
    def codes_shape(self) -> tuple[int, ...]:
        """That of the matrix."""
        return self.shape

    def read(self, parts: Parts, out: Tensor) -> None:
        """See `Format.read`."""
        codes, scales, zeros = parts
        torch.ops.lowrank.dequantize_groups(codes.view(-1), scales, zeros, out, self.group_size)

    def encode(self, dense: Tensor) -> list[Tensor]:
        """See `Format.encode`."""
        return list(groups.quantize_groups(dense, 255, self.group_size))

    def store(
        self, parts: Parts, new: Tensor, old: Tensor, seed: Seed | None, first: int, turn: Seed
    ) -> None:
        """See `Format.store`: each changed group gets its own new range."""
        codes, scales, zeros = parts
        store_changed(new, old, codes, scales, zeros, self.group_size, _signed(seed), first)

    def _codes_at(self, codes: Tensor, places: Tensor) -> Tensor:
        return codes.view(-1)[places].unsqueeze(1)


class Format4(Format):
    """Two codes a byte; see `lowrank.cuda.int4_update`."""

    BITS = 4
    PARTS = ("codes", "scales")

    @property
    def codes_shape(self) -> tuple[int, ...]:
        """(ceil(m n / 2),)."""
        return (-(-self.numel // 2),)

    def check(self, parts: Parts) -> None:
        """See `Format.check`."""
        super().check(parts)
        if self.group_size % 2:
            raise ValueError(f"group_size is {self.group_size}: accepted are even numbers")

    def read(self, parts: Parts, out: Tensor) -> None:
        """See `Format.read`."""
        codes, scales = parts
        torch.ops.lowrank.dequantize_int4(
            codes, scales, None, out, int4_update.FORMAT, self.group_size
        )

    def encode(self, dense: Tensor) -> list[Tensor]:
        """See `Format.encode`."""
        return list(int4_update.encode(dense, self.group_size))

    def store(
        self, parts: Parts, new: Tensor, old: Tensor, seed: Seed | None, first: int, turn: Seed
    ) -> None:
        """See `Format.store`: most groups keep their scale."""
        codes, scales = parts
        int4_update.store_changed(
            new, old, codes, scales, self.group_size, _signed(seed), first, turn
        )

    def _codes_at(self, codes: Tensor, places: Tensor) -> Tensor:
        pairs = codes[places // 2]
        return int4.pack(torch.where(places % 2 == 1, pairs >> 4, pairs & 15))


def _signed(seed: Seed | None) -> Seed | None:
    return seed if seed is None or isinstance(seed, Tensor) else signed_seed(seed)


class Chunk:
    """Whole groups of a quantised weight, for reading and writing.

    Args:
        format: of the weight.
        parts: views of the weight's.
        count: number of entries.
    """

    def __init__(self, format: Format, parts: Parts, count: int) -> None:
        self.format, self.parts, self.count = format, parts, count

    def load(self, dtype: torch.dtype) -> Tensor:
        """The entries, flat and dense."""
        out = torch.empty(self.count, dtype=dtype, device=self.parts[0].device)
        self.format.read(self.parts, out)
        return out

    def store(
        self,
        new: Tensor,
        old: Tensor,
        seed: Seed | None = None,
        first: int = 0,
        turn: Seed = 0,
    ) -> None:
        """Writes the groups in which `new` differs from `old`.

        Args:
            new: flat entries.
            old: the entries before, as `load` gave them.
            seed: rounds stochastically when given; a 0-d int64 tensor where only the device
                knows it.
            first: position of the first entry in the whole matrix, for the noise.
            turn: number of earlier calls with this seed, in four bits; a tensor as `seed` may be.
        """
        self.format.store(self.parts, new, old, seed, first, turn)

    def replace(self, new: Tensor, dtype: torch.dtype, *, nearest: bool) -> None:
        """Writes dense entries, groups with equal values excepted.

        A group whose entries change by less than a step on average is rounded stochastically, as
        each call of a running average would leave most of them unchanged otherwise; other groups,
        such as those of another weight, to the nearest codes.

        Args:
            new: flat entries.
            dtype: of the weight.
            nearest: rounds all groups to the nearest codes.
        """
        old = self.load(dtype)
        new = new.to(dtype)
        if nearest:
            self.store(new, old)
            return
        moves = (new.float() - old.float()).abs_()
        close = self._within_a_step(moves)
        self.store(torch.where(close, old, new), old)
        if bool((close & (new != old)).any()):
            seed = int(torch.randint(1 << 62, ()))
            self.store(torch.where(close, new, old), old, seed)

    def _within_a_step(self, moves: Tensor) -> Tensor:
        """For each entry, whether its group moves by less than a step on average."""
        size = self.format.group_size
        close = torch.empty(self.count, dtype=torch.bool, device=moves.device)
        for start, stop, width in groups.spans(self.count, size, moves.device):
            first = start // size
            steps = self.parts[1][first : first + (stop - start) // width].float()
            if self.format.BITS == 4:
                steps = steps * int4_update.LARGEST_STEP
            own = moves[start:stop].view(-1, width).mean(1) < steps
            close[start:stop] = own.repeat_interleave(width)
        return close


FORMATS: dict[int, type[Format]] = {8: Format8, 4: Format4}
#: Entries that share a scale, unless another number is given.
GROUP_SIZES = {8: groups.DEFAULT_GROUP, 4: int4_update.GROUP_SIZE}
