"""8-bit moments whose blocks of 256 entries are cut by the processes' parts.

The stored form doesn't depend on the number of processes: blocks are those of the whole tensor, so
a state made by four processes can be loaded by one. Where parts end at the ends of blocks (rows of
a matrix whose part has a multiple of 256 entries) each process quantises its own. Elsewhere codes
are the process's own, and scales, the largest entries of whole blocks, are reduced.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowrank.cuda import blockwise

from ..engine.sharding import Part, part_of
from .quantizers import Quantizer
from .rows import BLOCK


def cut_part(state: dict[str, Any]) -> Part | None:
    """The part that a state belongs to if it cuts blocks, else None."""
    part = part_of(state)
    if part is None or (not part.transposed and (part.spread.alone or _ends_with_blocks(part))):
        return None
    return part


def _ends_with_blocks(part: Part) -> bool:
    """Whether each process's part is what it holds of the blocks; the same on all processes."""
    size = torch.Size(part.shape)
    if part.axis != 0 or part.sizes or part.transposed:
        return False
    world = part.processes.world
    entries = -(-size[0] // world) * size[1:].numel()
    return entries % BLOCK == 0 and -(-_blocks(part) // world) == entries // BLOCK


def _blocks(part: Part) -> int:
    return -(-torch.Size(part.shape).numel() // BLOCK)


def scale_bytes(part: Part) -> int:
    """Bytes of the scales that the first process holds of a moment."""
    return 4 * -(-_blocks(part) // part.processes.world)


def scale_traffic(part: Part) -> int:
    """Bytes that a process sends for the scales of one moment in a step."""
    if part.axis is None or part.processes.world == 1 or _ends_with_blocks(part):
        return 0
    # Its own to read them all; the largest entries of all, with marks of what is no number.
    return scale_bytes(part) + 2 * 4 * _blocks(part)


def _block_of_entry(part: Part, device: torch.device) -> Tensor:
    """For each entry of this part the number of its block."""
    if part.transposed:
        return _block_of_entry(part.mirror(), device).mT
    size = torch.Size(part.shape)
    if part.axis is None:
        whole = torch.arange(size.numel(), device=device).view(size)
        return whole.div_(BLOCK, rounding_mode="floor")
    positions = torch.arange(part.stop - part.start, device=device) + part.start
    if part.axis == 0:
        width = size[1:].numel()
        columns = torch.arange(width, device=device).view(size[1:])
        positions = positions.view(-1, *[1] * len(size[1:])) * width + columns
    else:
        positions = positions + torch.arange(size[0], device=device)[:, None] * size[1]
    return positions.div_(BLOCK, rounding_mode="floor")


def dequantize(
    quantizer: Quantizer, codes: Tensor, absmax: Tensor, signed: bool, part: Part | None
) -> Tensor:
    """The dequantised part of a moment, fp32.

    Args:
        quantizer: used where blocks are whole.
        codes: of this part.
        absmax: the scales that this process holds.
        signed: which map.
        part: the part that cuts blocks, see `cut_part`.
    """
    if part is None:
        return quantizer.dequantize(codes, absmax, signed)
    scales = part.spread.gather_rows(absmax, _blocks(part))
    own = scales[_block_of_entry(part, codes.device).reshape(-1)]
    return blockwise.dequantize_blockwise(codes, own, signed, block=1)


def quantize(
    quantizer: Quantizer,
    moment: Tensor,
    signed: bool,
    out: tuple[Tensor, Tensor],
    part: Part | None,
) -> None:
    """Writes a part of a moment to its codes and the scales that this process holds."""
    if part is None:
        quantizer.quantize(moment.contiguous(), signed, out)
        return
    codes, absmax = out
    block = _block_of_entry(part, moment.device)
    scales = moment.new_zeros(_blocks(part))
    scales.scatter_reduce_(0, block.reshape(-1), moment.abs().reshape(-1), "amax")
    scales = part.spread.largest(scales)
    held = part.spread.columns(len(scales))
    absmax.copy_(scales[held.start : held.stop])
    own = scales[block]
    # Beside a 1, as blocks of two, ratios have the scale 1.
    ratio = moment / torch.where(own == 0, 1.0, own)
    pairs = torch.stack([ratio, torch.ones_like(ratio)], dim=-1)
    codes.copy_(blockwise.quantize_blockwise(pairs, signed, block=2)[0][..., 0])
