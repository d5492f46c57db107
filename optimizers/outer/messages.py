"""Sparse messages: the largest entries of each chunk of a tensor, with values of two bits.

A tensor is flattened and cut into chunks of c entries (the last one filled up with zeros). Of each
chunk the k largest by magnitude are sent: positions in two bytes, and the value as its sign and one
of two magnitudes. These are the mean of the magnitudes above the chunk's mean, and that of the
others, in fp32, which is Lloyd's quantiser after one step. With 32 bits values are sent as they
are, in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

#: Largest chunk, whose positions fit two bytes.
LARGEST_CHUNK = 1 << 15
BITS = (2, 32)
_SHIFTS = (0, 2, 4, 6)


@dataclass(frozen=True)
class Format:
    """How a tensor of `entries` entries is sent.

    Attributes:
        entries: of the tensor.
        chunk: c, at most the entries.
        kept: k, at most c.
        bits: of a value, 2 or 32.
    """

    entries: int
    chunk: int
    kept: int
    bits: int

    @classmethod
    def of(cls, entries: int, density: float, chunk: int, bits: int) -> Format:
        """The format of a tensor; at least one entry of each chunk is sent."""
        width = max(min(chunk, entries), 1)
        return cls(entries, width, max(1, round(density * width)), bits)

    @property
    def chunks(self) -> int:
        """Number of chunks."""
        return -(-self.entries // self.chunk)

    @property
    def _sizes(self) -> tuple[int, int, int]:
        """Bytes of positions, of values and of magnitudes."""
        count = self.chunks * self.kept
        if self.bits == 2:
            return 2 * count, -(-count // 4), 8 * self.chunks
        return 2 * count, 4 * count, 0

    @property
    def message_bytes(self) -> int:
        """Bytes of a message."""
        return sum(self._sizes)

    def encode(self, values: Tensor) -> Tensor:
        """The message of a tensor, uint8."""
        flat = values.reshape(-1)
        padded = functional.pad(flat, (0, self.chunks * self.chunk - self.entries))
        chunks = padded.view(self.chunks, self.chunk)
        at = chunks.abs().topk(self.kept, dim=1).indices.sort(dim=1).values
        found = chunks.gather(1, at)
        parts = [at.to(torch.int16).reshape(-1).view(torch.uint8)]
        if self.bits == 2:
            parts += _quantised(found)
        else:
            parts.append(found.float().reshape(-1).view(torch.uint8))
        return torch.cat(parts)

    def decode(self, message: Tensor, dtype: torch.dtype) -> Tensor:
        """The tensor of a message, flat, zero where nothing was sent."""
        positions, values, magnitudes = torch.split(message, list(self._sizes))
        shape = (self.chunks, self.kept)
        at = positions.clone().view(torch.int16).view(shape).long()
        if self.bits == 2:
            shifts = torch.tensor(_SHIFTS, device=message.device)
            codes = ((values.long().unsqueeze(1) >> shifts) & 3).reshape(-1)
            codes = codes[: self.chunks * self.kept].view(shape)
            pair = magnitudes.clone().view(torch.float32).view(self.chunks, 2)
            found = pair.gather(1, codes & 1) * (1 - (codes & 2))
        else:
            found = values.clone().view(torch.float32).view(shape)
        dense = torch.zeros(self.chunks, self.chunk, dtype=dtype, device=message.device)
        return dense.scatter_(1, at, found.to(dtype)).view(-1)[: self.entries]


def _quantised(found: Tensor) -> list[Tensor]:
    """Codes, four a byte (bit 0 the magnitude, bit 1 the sign), and two magnitudes a chunk."""
    sizes = found.abs()
    large = sizes > sizes.mean(1, keepdim=True)
    pair = [
        (sizes * own).sum(1) / own.sum(1).clamp(min=1) for own in (~large, large)
    ]  # where all are equal none is large
    codes = (large.long() + 2 * (found < 0).long()).reshape(-1)
    codes = functional.pad(codes, (0, -len(codes) % 4)).view(-1, 4)
    shifts = torch.tensor(_SHIFTS, device=found.device)
    packed = (codes << shifts).sum(1).to(torch.uint8)
    return [packed, torch.stack(pair, 1).float().reshape(-1).view(torch.uint8)]
