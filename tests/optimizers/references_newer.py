"""Newer methods in plain fp64 tensors, from their papers' rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from references import down, up
from references_beyond import Bases, adam_moments
from torch import Tensor


def normalised(g: Tensor, axis: int, eps: float = 1e-8) -> Tensor:
    """Divided by the root mean square along an axis."""
    return g / (g.square().mean(axis, keepdim=True).sqrt() + eps)


def scale(
    grads: Sequence[Tensor],
    weight: Tensor,
    *,
    lr: float,
    axis: int = 1,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
) -> Tensor:
    """SCALE of a hidden matrix, with momentum of the head, with axis 0 of an embedding."""
    w, m = weight.double().clone(), torch.zeros_like(weight).double()
    for g in grads:
        m = momentum * m + (1 - momentum) * g.double()
        w = w * (1 - lr * weight_decay) - lr * normalised(m, axis)
    return w


def racs(
    grads: Sequence[Tensor],
    weight: Tensor,
    *,
    lr: float,
    beta: float = 0.9,
    scale: float = 0.05,
    limiter: float | None = 1.01,
    weight_decay: float = 0.0,
) -> Tensor:
    w, stored = weight.double().clone(), None
    means_q, means_s = torch.zeros(w.shape[0]).double(), torch.zeros(w.shape[1]).double()
    for g in grads:
        g = g.double()
        q = torch.ones(w.shape[0]).double()
        for _ in range(5):
            s = torch.diag(g.T @ torch.diag(q) @ g) / q.square().sum()
            q = torch.diag(g @ torch.diag(s) @ g.T) / s.square().sum()
        means_q, means_s = beta * means_q + (1 - beta) * q, beta * means_s + (1 - beta) * s
        u = torch.diag(means_q**-0.5) @ g @ torch.diag(means_s**-0.5)
        if limiter is not None:
            if stored is not None:
                u = u / (max(float(u.norm()) / (stored + 1e-8), limiter) / limiter)
            stored = float(u.norm())
        w = w * (1 - lr * weight_decay) - lr * scale * u
    return w


def cautious(
    grads: Sequence[Tensor],
    weight: Tensor,
    *,
    lr: float,
    mask: bool = True,
    betas: tuple[float, float] = (0.9, 0.99),
    stored: Callable[[Tensor, int], Tensor] = lambda m, t: m,
    weight_decay: float = 0.0,
) -> Tensor:
    """`stored`: the momentum as it is read back after step t."""
    w, (b1, b2) = weight.double().clone(), betas
    m, r, c = torch.zeros_like(w), 0.0, 0.0
    for t, g in enumerate(map(Tensor.double, grads), 1):
        r = b2 * r + (1 - b2) * g.square().mean(1)
        c = b2 * c + (1 - b2) * g.square().mean(0)
        v = torch.outer(r, c) / r.mean() / (1 - b2**t)
        m = b1 * m + (1 - b1) * g
        d = m / (1 - b1**t) / (v.sqrt() + 1e-8)
        if mask:
            k = (d * g > 0).double()
            d = d * k / k.mean(1, keepdim=True).clamp(min=1e-3)
        w = w * (1 - lr * weight_decay) - lr * d
        m = stored(m, t)
    return w


def blocks(n: int, width: int) -> Tensor:
    """n x blocks: 1 where a column belongs to a block."""
    block = torch.arange(n) // width
    return torch.eye(int(block[-1]) + 1, dtype=torch.float64)[block]


def foam(
    grads: Sequence[Tensor],
    weight: Tensor,
    *,
    lr: float,
    level: int,
    scale: float = 0.25,
    c: float = 1.0,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> Tensor:
    w, m, v = weight.double().clone(), torch.zeros(()).double(), torch.zeros(()).double()
    members = blocks(w.shape[1], 2**level)
    mean, repeat = members / members.sum(0), members.T
    for t, g in enumerate(grads, start=1):
        g = g.double()
        m = betas[0] * m + (1 - betas[0]) * g @ mean
        v = betas[1] * v + (1 - betas[1]) * (g * g) @ mean
        m_hat, v_hat = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
        res = g - g @ mean @ repeat
        u = (m_hat @ repeat + c * res) / ((v_hat @ repeat + c * c * res * res).sqrt() + eps)
        w = w * (1 - lr * weight_decay) - lr * scale * u
    return w


def haar(level: int) -> Tensor:
    """The orthogonal Haar transform of 2^level numbers, the approximation first."""
    made = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(level):
        size = len(made)
        made = torch.cat(
            [
                torch.kron(made, torch.tensor([[1.0, 1.0]], dtype=torch.float64)),
                torch.kron(
                    torch.eye(size, dtype=torch.float64),
                    torch.tensor([[1.0, -1.0]], dtype=torch.float64),
                ),
            ]
        ) / (2**0.5)
    return made


def gwt(
    grads: Sequence[Tensor],
    weight: Tensor,
    *,
    lr: float,
    level: int,
    scale: float = 0.25,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    limiter: float | None = 1.01,
) -> Tensor:
    """By the Haar transform itself; rows must consist of whole blocks."""
    w, stored = weight.double().clone(), None
    width = 2**level
    transform = torch.kron(torch.eye(w.shape[1] // width, dtype=torch.float64), haar(level))
    m, v = torch.zeros(()).double(), torch.zeros(()).double()
    for t, g in enumerate(grads, start=1):
        coefficients = g.double() @ transform.T
        m, v = adam_moments(coefficients[:, ::width], m, v, betas)
        root = (v / (1 - betas[1] ** t)).sqrt() + eps
        made = coefficients / root.repeat_interleave(width, 1)
        made[:, ::width] = m / (1 - betas[0] ** t) / root
        u = made @ transform
        if limiter is not None:
            if stored is not None:
                u = u / (max(float(u.norm()) / (stored + 1e-8), limiter) / limiter)
            stored = float(u.norm())
        w = w - lr * scale * u
    return w


def ridged(gram: Tensor, ridge: float, least: float = 0.0) -> Tensor:
    mean = float(gram.diagonal().mean())
    eye = torch.eye(len(gram), dtype=torch.float64)
    return torch.linalg.inv(gram + max(ridge * mean, least) * eye)


def lora_pre(
    grads: Sequence[Tensor],
    weight: Tensor,
    starts: tuple[Tensor, Tensor],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    ridge: float = 1e-5,
    weight_decay: float = 0.0,
) -> Tensor:
    """`starts`: A and A' of the first step; B and B' are zero."""
    w = weight.double().clone()
    factors = [(torch.zeros(len(w), len(a)).double(), a.double()) for a in starts]
    shares = (1 - betas[0] ** 0.5, 1 - betas[1] ** 0.25)
    for t, g in enumerate(grads, start=1):
        g = g.double()
        (b, a), (vb, va) = factors
        m = betas[0] * b @ a + (1 - betas[0]) * g
        v = betas[1] * (vb @ va).square() + (1 - betas[1]) * g.square()
        for i, (share, x) in enumerate(zip(shares, (g, g.abs()), strict=True)):
            b, a = factors[i]
            to_b = x @ a.T @ ridged(a @ a.T, ridge)
            least = 1e-3 * share**2 * float(to_b.square().sum()) / len(a)
            to_a = torch.zeros_like(a)
            if float(b.norm()) > 0:
                to_a = ridged(b.T @ b, ridge, least) @ b.T @ x
            factors[i] = ((1 - share) * b + share * to_b, (1 - share) * a + share * to_a)
        step = m / (1 - betas[0] ** t) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
        w = w * (1 - lr * weight_decay) - lr * step
    return w


def alice(
    grads: Sequence[Tensor],
    weight: Tensor,
    bases_at: Callable[[int], Bases],
    *,
    lr: float,
    scale: float = 0.3,
    share: float = 0.4,
    beta: float = 0.9,
    betas: tuple[float, float] = (0.9, 0.9),
    eps: float = 1e-6,
    limiter: float | None = 1.01,
    weight_decay: float = 0.0,
) -> Tensor:
    """The final weight; `bases_at(k)` are those of step k."""
    w, stored = weight.double().clone(), None
    m, v = torch.zeros(()).double(), torch.zeros(()).double()
    p = torch.zeros(()).double()
    for k, g in enumerate(grads):
        g = g.double()
        left, right = bases_at(k)
        axis, basis = (0, left) if right is None else (1, right)
        r = down(g, left, right)
        m, v = adam_moments(r, m, v, betas)
        sums = g.square().sum(axis, keepdim=True) - r.square().sum(axis, keepdim=True)
        p = beta * p + (1 - beta) * sums
        c = (len(basis) - basis.shape[1]) ** 0.5 * (g - up(r, left, right)) / p.sqrt()
        if limiter is not None:
            if stored is not None:
                c = c / (max(float(c.norm()) / (stored + 1e-8), limiter) / limiter)
            stored = float(c.norm())
        w = w - lr * scale * (up(m / (v.sqrt() + eps), left, right) + share * c)
        w = w * (1 - lr * weight_decay)
    return w


def alice_basis(
    grad: Tensor, basis: Tensor, tracked: Tensor | None, leading: int, beta: float
) -> Tensor:
    """The leading columns of the next left basis, up to signs, by d x d matrices."""
    q = grad @ grad.T
    if tracked is not None:
        q = beta * basis @ tracked @ basis.T + (1 - beta) * q
    span = torch.linalg.qr(q @ basis).Q
    _, vectors = torch.linalg.eigh(span.T @ q @ span)
    return span @ vectors.flip(1)[:, :leading]


def power_basis(b: Tensor, basis: Tensor | None, rank: int) -> Tensor:
    """One block power iteration of a left basis, up to signs; singular vectors at first."""
    if basis is None:
        return torch.linalg.svd(b, full_matrices=False).U[:, :rank]
    return torch.linalg.qr(b @ b.T @ basis).Q


def ldadam(
    grads: Sequence[Tensor],
    weight: Tensor,
    *,
    rank: int,
    lr: float,
    betas: tuple[float, float] = (0.908, 0.99),
    rho: float = 0.908,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    feedback: bool = True,
) -> tuple[Tensor, Tensor]:
    """The final weight and error; of a wide matrix, whose left side is projected."""
    w, error = weight.double().clone(), torch.zeros_like(weight).double()
    basis: Tensor | None = None
    m = v = torch.zeros(rank, w.shape[1]).double()
    for k, g in enumerate(grads):
        a = g.double() + error
        old, c1, c2 = basis, 1 - betas[0] ** k, 1 - betas[1] ** k
        b = a if old is None else rho * old @ m / c1 + (1 - rho) * a
        basis = power_basis(b, old, rank)
        moved = m
        if old is not None:
            turn = basis.T @ old
            moved = turn @ m
            variance = turn.square() @ (v / c2 - (m / c1).square())
            v = (c2 * (variance + (moved / c1).square())).abs()
        lost = betas[0] / (1 - betas[0]) * ((0 if old is None else old @ m) - basis @ moved)
        r = basis.T @ a
        m, v = adam_moments(r, moved, v, betas)
        step = m / (1 - betas[0] ** (k + 1)) / ((v / (1 - betas[1] ** (k + 1))).sqrt() + eps)
        w = w * (1 - lr * weight_decay) - lr * basis @ step
        error = a - basis @ r + lost if feedback else error
    return w, error
