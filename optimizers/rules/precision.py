"""The precision of moments."""

from __future__ import annotations

import torch

#: Accepted values of the option `moments_dtype`.
MOMENT_DTYPES = {None: None, "float32": torch.float32, "bfloat16": torch.bfloat16}
HALF = (torch.bfloat16, torch.float16)


def moments_dtype(choice: torch.dtype | None, like: torch.dtype) -> torch.dtype:
    """The precision of moments under weights of dtype `like`: `choice`, or at least fp32.

    In bf16 a decay of 0.1 % is below half a unit in the last place: a second moment with b2 = 0.999
    would never decrease. In fp16 squares of gradients below 2e-4 are zero.
    """
    if choice is not None:
        return choice
    return torch.float32 if like in HALF else like


def moments_itemsize(choice: torch.dtype | None, itemsize: int) -> int:
    """Bytes of an entry of a moment under weights of `itemsize` bytes an entry."""
    return max(itemsize, 4) if choice is None else choice.itemsize
