"""Online Subspace Descent, APOLLO, FRUGAL, Flora and Lion in plain fp64 tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from references import down, galore_bases, up
from torch import Tensor

Bases = tuple[Tensor | None, Tensor | None]


def adam_moments(
    g: Tensor, m: Tensor, v: Tensor, betas: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    return betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g * g


def pca_loss(basis: Tensor, grad: Tensor, left: bool, penalty: float) -> Tensor:
    """||P P^T Ghat - Ghat||^2 + penalty ||P^T P - I||^2, as it is written."""
    hat = grad / grad.norm()
    back = basis @ basis.T @ hat if left else hat @ basis @ basis.T
    gram = basis.T @ basis
    return (back - hat).square().sum() + penalty * (gram - torch.eye(len(gram))).square().sum()


def pca_gradient(basis: Tensor, grad: Tensor, left: bool, penalty: float) -> Tensor:
    """By autograd."""
    with torch.enable_grad():
        basis = basis.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(pca_loss(basis, grad, left, penalty), basis)
    return gradient


def online_subspace(
    grads: Sequence[Tensor],
    weight: Tensor,
    *,
    rank: int,
    lr: float,
    online_lr: float,
    online_optimizer: str,
    factors: Sequence[float],
    scale: float = 0.25,
    proj_type: str = "std",
    penalty: float = 0.0,
    weight_decay: float = 0.0,
    rule: str = "adamw",
) -> tuple[Tensor, Tensor]:
    """The final weight and basis; `factors` are those of the learning rate schedule."""
    w = weight.double().clone()
    m, v = torch.zeros(()).double(), torch.zeros(()).double()
    left, right = galore_bases(grads[0], rank, proj_type)
    basis = left if left is not None else right
    pm = pv = torch.zeros_like(basis)
    for k, (g, factor) in enumerate(zip(grads, factors, strict=True)):
        bases: Bases = (basis, None) if left is not None else (None, basis)
        r = down(g, *bases)
        eta = lr * factor
        if rule == "lion":
            direction = up(0.9 * m + 0.1 * r, *bases).sign()
            m = 0.99 * m + 0.01 * r
            w = w - eta * direction
        else:
            m, v = adam_moments(r, m, v, (0.9, 0.999))
            size = eta * (1 - 0.999 ** (k + 1)) ** 0.5 / (1 - 0.9 ** (k + 1))
            w = w - size * scale * up(m / (v.sqrt() + 1e-6), *bases)
        w = w - eta * weight_decay * w
        if k == 0:
            continue
        d = pca_gradient(basis, g, left is not None, penalty)
        step = online_lr * factor
        if online_optimizer == "sgd":
            basis = basis - step * d
        elif online_optimizer == "lion":
            basis = basis - step * (0.9 * pm + 0.1 * d).sign()
            pm = 0.99 * pm + 0.01 * d
        else:
            pm, pv = adam_moments(d, pm, pv, (0.9, 0.999))
            c1, c2 = 1 - 0.9**k, 1 - 0.999**k
            basis = basis * (1 - step * 0.01)
            basis = basis - step * (pm / c1) / ((pv / c2).sqrt() + 1e-8)
    return w, basis


def apollo(
    grads: Sequence[Tensor],
    weight: Tensor,
    bases_at: Callable[[int], Bases],
    *,
    lr: float,
    scale: float,
    scale_type: str,
    scale_front: bool = False,
    limiter: float | None = 1.01,
    weight_decay: float = 0.0,
) -> Tensor:
    """The final weight; `bases_at(k)` are those of step k."""
    w, stored = weight.double().clone(), None
    m, v = torch.zeros(()).double(), torch.zeros(()).double()
    for k, g in enumerate(grads):
        left, right = bases_at(k)
        r = down(g, left, right)
        m, v = adam_moments(r, m, v, (0.9, 0.999))
        n = m / (v.sqrt() + 1e-6)
        if scale_type == "tensor":
            s = n.norm() / (r.norm() + 1e-8) * g
        else:
            axis = 1 if left is None else 0
            s = n.norm(dim=axis, keepdim=True) / (r.norm(dim=axis, keepdim=True) + 1e-8) * g
        if scale_front:
            s = s * scale**0.5
        if limiter is not None:
            if stored is not None:
                s = s / (max(s.norm() / (stored + 1e-8), limiter) / limiter)
            stored = s.norm()
        if not scale_front:
            s = s * scale**0.5
        w = w - lr * (1 - 0.999 ** (k + 1)) ** 0.5 / (1 - 0.9 ** (k + 1)) * s
        w = w - lr * weight_decay * w
    return w


def frugal(
    grads: Sequence[Tensor],
    weight: Tensor,
    bases_at: Callable[[int], Bases],
    *,
    gap: int,
    lr: float,
    scale: float = 1.0,
    inactive: float = 1.0,
    update: str = "sign",
    weight_decay: float = 0.01,
) -> Tensor:
    """The final weight; moments and bias corrections start anew every `gap` steps."""
    w = weight.double().clone()
    m = v = torch.zeros(()).double()
    for k, g in enumerate(grads):
        left, right = bases_at(k)
        t = k % gap + 1
        if t == 1:
            m = v = torch.zeros(()).double()
        r = down(g, left, right)
        m, v = adam_moments(r, m, v, (0.9, 0.999))
        outside = g - up(r, left, right)
        outside = outside.sign() if update == "sign" else outside
        step = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        w = w * (1 - lr * weight_decay)
        w = w - lr * scale * (up(step, left, right) + inactive * outside)
    return w


def flora(
    grads: Sequence[Tensor],
    weight: Tensor,
    bases_at: Callable[[int], Bases],
    *,
    kappa: int,
    lr: float,
    beta1: float | None = 0.9,
    weight_decay: float = 0.0,
    scale_parameter: bool = True,
    clip_threshold: float = 1.0,
) -> Tensor:
    """The final weight; `bases_at(i)` are those of the i-th run of kappa steps."""
    w = weight.double().clone()
    row = col = c = torch.zeros(()).double()
    for t, g in enumerate(grads, start=1):
        decay = 1 - t**-0.8
        a = g * g + 1e-30
        row, col = decay * row + (1 - decay) * a.mean(1), decay * col + (1 - decay) * a.mean(0)
        u = g / (torch.outer(row, col) / row.mean()).sqrt()
        u = u / max(1.0, u.square().mean().sqrt().item() / clip_threshold)
        rate = lr * (max(1e-3, w.square().mean().sqrt().item()) if scale_parameter else 1.0)
        u = rate * u
        if beta1 is not None:
            bases = bases_at(t // kappa)
            if t % kappa == 0:
                c = down(up(c, *bases_at(t // kappa - 1)), *bases)
            step = (1 - beta1) * u + beta1 * (up(c, *bases) if t > 1 else 0.0)
            c = beta1 * c + (1 - beta1) * down(u, *bases)
            u = step
        w = w - weight_decay * rate * w - u
    return w


def lion(
    grads: Sequence[Tensor], weight: Tensor, *, lr: float, weight_decay: float, decay_first: bool
) -> Tensor:
    """Lion on the whole gradient."""
    w, m = weight.double().clone(), torch.zeros_like(weight).double()
    for g in grads:
        w = w * (1 - lr * weight_decay) if decay_first else w
        w = w - lr * (0.9 * m + 0.1 * g).sign()
        m = 0.99 * m + 0.01 * g
        w = w if decay_first else w * (1 - lr * weight_decay)
    return w


def one_sided(basis: Any, left: bool) -> Bases:
    return (basis, None) if left else (None, basis)
