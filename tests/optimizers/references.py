"""Each method as a dozen lines of plain fp64 tensors, written from its paper and formula sheet."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def adam(
    grads: Sequence[Tensor],
    weight: Tensor,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float,
    weight_decay: float,
    torch_form: bool,
) -> Tensor:
    """AdamW in torch's or transformers' form; returns the final weight."""
    w, m, v = weight.double().clone(), torch.zeros_like(weight), torch.zeros_like(weight)
    m, v = m.double(), v.double()
    for t, g in enumerate(grads, start=1):
        g = g.double()
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        c1, c2 = 1 - betas[0] ** t, (1 - betas[1] ** t) ** 0.5
        if torch_form:
            w = w - lr * weight_decay * w
            w = w - lr * (m / c1) / (v.sqrt() / c2 + eps)
        else:
            w = w - lr * c2 / c1 * m / (v.sqrt() + eps)
            w = w - lr * weight_decay * w
    return w


def galore_bases(grad: Tensor, rank: int, proj_type: str) -> tuple[Tensor | None, Tensor | None]:
    """(left m x r or None, right n x r or None) from an fp64 SVD."""
    m, n = grad.shape
    u, _, vh = torch.linalg.svd(grad.double(), full_matrices=False)
    left, right = u[:, :rank], vh[:rank].T
    if proj_type == "full":
        return left, right
    on_right = {"std": m >= n, "reverse_std": m < n, "right": True, "left": False}[proj_type]
    return (None, right) if on_right else (left, None)


def down(x: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    x = x if left is None else left.T @ x
    return x if right is None else x @ right


def up(y: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    y = y if left is None else left @ y
    return y if right is None else y @ right.T


def galore_adamw(
    grads: Sequence[Tensor],
    weight: Tensor,
    *,
    rank: int,
    gap: int,
    scale: float,
    proj_type: str,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    correct_bias: bool = True,
) -> Tensor:
    """GaLore with transformers' AdamW; returns the final weight."""
    w = weight.double().clone()
    m = v = torch.zeros((), dtype=torch.float64)
    left = right = None
    for k, g in enumerate(grads):
        g = g.double()
        if k % gap == 0:
            left, right = galore_bases(g, rank, proj_type)
        r = down(g, left, right)
        m = betas[0] * m + (1 - betas[0]) * r
        v = betas[1] * v + (1 - betas[1]) * r * r
        c1, c2 = 1 - betas[0] ** (k + 1), (1 - betas[1] ** (k + 1)) ** 0.5
        size = lr * c2 / c1 if correct_bias else lr
        w = w - size * scale * up(m / (v.sqrt() + eps), left, right)
        w = w - lr * weight_decay * w
    return w


def adafactor(
    grads: Sequence[Tensor],
    weight: Tensor,
    *,
    lr: float | None,
    rank: int = 0,
    gap: int = 1,
    scale: float = 1.0,
    proj_type: str = "std",
    eps: tuple[float, float] = (1e-30, 1e-3),
    clip_threshold: float = 1.0,
    decay_rate: float = -0.8,
    beta1: float | None = None,
    weight_decay: float = 0.0,
    scale_parameter: bool = True,
    warmup_init: bool = False,
) -> Tensor:
    """Adafactor, in GaLore's subspace when `rank` is not 0; lr None means relative steps."""
    w = weight.double().clone()
    row = col = second = moment = torch.zeros((), dtype=torch.float64)
    left = right = None
    for k, g in enumerate(grads):
        g, t = g.double(), k + 1
        if rank and k % gap == 0:
            left, right = galore_bases(g, rank, proj_type)
        r = down(g, left, right)
        decay = 1 - t**decay_rate
        a = r * r + eps[0]
        if r.dim() == 2:
            row = decay * row + (1 - decay) * a.mean(1)
            col = decay * col + (1 - decay) * a.mean(0)
            u = r / (torch.outer(row, col) / row.mean()).sqrt()
        else:
            second = decay * second + (1 - decay) * a
            u = r / second.sqrt()
        u = u / max(1.0, u.square().mean().sqrt().item() / clip_threshold)
        rate = lr if lr is not None else min(1e-6 * t if warmup_init else 1e-2, t**-0.5)
        if scale_parameter:
            rate = rate * max(eps[1], w.square().mean().sqrt().item())
        u = rate * u
        if beta1:
            moment = beta1 * moment + (1 - beta1) * u
            u = moment
        w = w - weight_decay * rate * w
        w = w - scale * up(u, left, right)
    return w


def muon(
    grads: Sequence[Tensor], weight: Tensor, *, lr: float, momentum: float, weight_decay: float
) -> Tensor:
    """Muon with Nesterov momentum and its original step size."""
    w, moment = weight.double().clone(), torch.zeros_like(weight).double()
    for g in grads:
        g = g.double()
        moment = momentum * moment + (1 - momentum) * g
        x = (1 - momentum) * g + momentum * moment
        tall = x.shape[0] > x.shape[1]
        x = x.T if tall else x
        x = x / x.norm()
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        x = x.T if tall else x
        w = w * (1 - lr * weight_decay) - lr * max(1.0, w.shape[0] / w.shape[1]) ** 0.5 * x
    return w
