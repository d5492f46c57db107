"""Fira's bound on the growth of norms from one step to the next, of many matrices at once.

With s the norm after the last step (0 for none), L the limit and n the norm of this step:

    factor = min(1, (s + 1e-8) L / n),    s <- min(n, (s + 1e-8) L)

and factor 1, s <- n where there is no s (Chen et al., "Fira", arXiv 2410.01623).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import addresses, expect, pointer, usable


def limit_flat(
    stored: list[Tensor], norms: Tensor, good: Tensor | None, factors: Tensor, limit: float
) -> None:
    """The reference of `torch.ops.lowrank.limit_growth`.

    Args:
        stored: s of each matrix, 0-d; advanced in place.
        norms: n of each, flat.
        good: bool, flat: the others keep s, with a factor of 1; None for all.
        factors: of each, flat; written.
        limit: L, such as 1.01.
    """
    stored_b = torch.stack(stored)
    if good is not None:
        norms = torch.where(good, norms, stored_b)
    none_b = stored_b <= 0
    largest_b = torch.where(none_b, torch.inf, (stored_b + 1e-8) * limit)
    factors.copy_(torch.where(none_b, 1.0, (largest_b / norms).clamp(max=1.0)))
    kept_b = torch.minimum(norms, largest_b).to(stored_b.dtype)
    torch._foreach_copy_(stored, list(kept_b.unbind(0)))


def limit_growth(
    stored: list[Tensor], norms: Tensor, good: Tensor | None, factors: Tensor, limit: float
) -> bool:
    """The compiled one; see `native_quantize` for what it returns."""
    library = usable(*stored, norms, good, factors)
    if library is None or {t.dtype for t in (*stored, norms, factors)} != {torch.float32}:
        return False
    for norm in stored:
        expect("stored", norm, 1)
    for name, flat in (("norms", norms), ("factors", factors)):
        expect(name, flat, len(stored))
    expect("good", good, len(stored), torch.bool)
    library.call(
        "limit_growth",
        norms.device,
        *(len(stored), addresses(stored), norms.data_ptr(), pointer(good), factors.data_ptr()),
        limit,
    )
    return True
