"""Q-GaLore as plain tensors from its formula sheet; fp64 but for what is stored in fp32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank.cuda.noise import uniform
from lowrank.optimizers.engine.seeds import draw_seed


class Coded(NamedTuple):
    """Codes, and each entry's scale and zero point, all flat."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor

    @property
    def dense(self) -> Tensor:
        return self.scales * (self.codes - self.zeros)


def coded(x: Tensor, levels: int, group: int, noise: Tensor | None = None) -> Coded:
    """One group after the other; the scale as fp32 holds it."""
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    flat = x.double().flatten()
    for start in range(0, flat.numel(), group):
        part = flat[start : start + group]
        low, high = min(float(part.min()), 0.0), max(float(part.max()), 0.0)
        s = torch.tensor(max(high - low, 1e-5) / levels).float().double()
        z = (-(low / s).round()).clamp(0, levels)
        units = part / s
        whole = units.round() if noise is None else (units + noise[start : start + group]).floor()
        ones = torch.ones_like(part)
        parts.append(((whole + z).clamp(0, levels), s * ones, z * ones))
    return Coded(*(torch.cat(column) for column in zip(*parts, strict=True)))


class Run(NamedTuple):
    """What a run came to."""

    weight: Coded
    gap: int
    refreshed: list[int]


def qgalore(
    grads: Sequence[Tensor],
    weight: Tensor,
    *,
    rank: int,
    gap: int,
    scale: float,
    lr: float,
    weight_decay: float,
    basis_group: int,
    weight_group: int,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    cos_threshold: float = 0.4,
    gamma_proj: float = 2.0,
    queue_size: int = 5,
    seed: int = 0,
    name: str = "param.0",
) -> Run:
    """Lazy refreshes, INT4 basis, Adam in fp64, INT8 weight with stochastic rounding."""
    m, n = weight.shape
    right = m >= n
    w = coded(weight, 255, weight_group)
    first = second = torch.zeros((), dtype=torch.float64)
    basis = torch.zeros(())
    former = None
    queue: list[float] = []
    refreshed = []
    for k, g in enumerate(grads):
        if k % gap == 0:
            u, _, vh = torch.linalg.svd(g.float(), full_matrices=False)
            official = vh[:rank] if right else u[:, :rank]
            p = coded(official, 15, basis_group).dense.view(official.shape)
            basis = p.T if right else p
            leading = vh[0] if right else u[:, 0]
            if former is not None:
                queue = [*queue, float(leading @ former)][-queue_size:]
                if len(queue) == queue_size and sum(queue) / queue_size >= cos_threshold:
                    gap = int(gap * gamma_proj)
            former = leading
            refreshed.append(k)
        r = g.double() @ basis if right else basis.T @ g.double()
        first = betas[0] * first + (1 - betas[0]) * r
        second = betas[1] * second + (1 - betas[1]) * r * r
        c1, c2 = 1 - betas[0] ** (k + 1), (1 - betas[1] ** (k + 1)) ** 0.5
        step = first / c1 / (second.sqrt() / c2 + eps)
        dense = w.dense.view(m, n)
        dense = dense - lr * scale * (step @ basis.T if right else basis @ step)
        dense = dense - lr * weight_decay * dense
        noise = uniform(m * n, draw_seed(seed, name, k, "rounding")).double()
        w = coded(dense, 255, weight_group, noise)
    return Run(w, gap, refreshed)
