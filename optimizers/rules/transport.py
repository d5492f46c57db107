"""Transport of Adam's moments into a new subspace."""

from __future__ import annotations

import torch
from torch import Tensor

from ..engine.chunks import wide_dtype
from ..engine.rotation import Rotation


def transported_moments(
    m: Tensor, v: Tensor, how: str, rotation: Rotation, betas: tuple[float, float], steps: int
) -> tuple[Tensor, Tensor]:
    """Adam's moments in the coordinates of a new subspace.

    Args:
        m: first moment.
        v: second moment.
        how: "reset", "restore" (COAP, arXiv 2412.00071: M -> C M, V -> (C sqrt(V))^2) or "rotate"
            (LDAdam, arXiv 2410.16103: V as the variance of independent coordinates).
        rotation: C, from old coordinates to new ones.
        betas: decay rates.
        steps: number of gradients that the moments have averaged.

    Returns:
        Both moments, in new tensors or the old ones (if no axis is projected).
    """
    if how == "reset" or steps == 0:
        return torch.zeros_like(m), torch.zeros_like(v)
    if how == "restore":
        return rotation(m), rotation(v.sqrt()).square_()
    wide = wide_dtype(m)
    correction1, correction2 = (1.0 - beta**steps for beta in betas)
    mean = m.to(wide) / correction1
    moved_mean = rotation(mean)
    variance = rotation.squared()(v.to(wide) / correction2 - mean.square())
    return moved_mean * correction1, (variance + moved_mean.square()).abs_() * correction2
