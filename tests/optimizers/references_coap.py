"""COAP written out with whole tensors: its loss by autograd, steps on matrices and 4-D weights."""

from __future__ import annotations

from collections.abc import Callable

import references
import torch
from torch import Tensor
from torch.nn import functional

from lowrank.optimizers.engine.geometry import Side


def gradient(grad: Tensor, basis: Tensor, moment: Tensor | None, side: Side) -> Tensor:
    """dL/dP of MSE(up(down(G)), G) (1 - mean cos(up(M), G)), the first factor without a moment."""
    leaf = basis.clone().requires_grad_()
    if side is Side.RIGHT:
        rebuilt = grad @ leaf @ leaf.T
        moved = None if moment is None else moment @ leaf.T
    else:
        rebuilt = leaf @ (leaf.T @ grad)
        moved = None if moment is None else leaf @ moment
    loss = functional.mse_loss(rebuilt, grad)
    if moved is not None:
        loss = loss * (1 - functional.cosine_similarity(moved, grad, dim=1).mean())
    return torch.autograd.grad(loss, leaf)[0]


def clipped(step: Tensor) -> Tensor:
    """As `clip_grad_norm_` to 1 does it."""
    return step * min(1.0, 1.0 / (step.norm().item() + 1e-6))


def adam(low: Tensor, m: Tensor, v: Tensor, k: int, lr: float) -> tuple[Tensor, Tensor, Tensor]:
    """Both moments and the step of transformers' AdamW, eps 1e-6."""
    m, v = 0.9 * m + 0.1 * low, 0.999 * v + 0.001 * low * low
    size = lr * (1 - 0.999 ** (k + 1)) ** 0.5 / (1 - 0.9 ** (k + 1))
    return m, v, size * m / (v.sqrt() + 1e-6)


def matrices(
    grads: list[Tensor],
    weight: Tensor,
    *,
    rank: int,
    interval: int,
    factor: int,
    restore: bool,
    lr: float,
    scale: float,
) -> Tensor:
    """The weight after these gradients, right or left by shape."""
    w, p = weight.clone(), None
    right = w.shape[0] >= w.shape[1]
    m = v = torch.zeros((), dtype=w.dtype)
    for k, g in enumerate(grads):
        tall = g if right else g.T
        old = p
        if k % (interval * factor) == 0:
            generator = torch.Generator().manual_seed(3407)
            omega = torch.randn(tall.shape[1], rank, generator=generator) if p is None else p
            q = torch.linalg.qr(tall @ omega.to(tall.dtype)).Q
            p = torch.linalg.svd(q.T @ tall, full_matrices=False).Vh.T
        elif k % interval == 0:
            p = p - 0.1 * clipped(gradient(g, p, m, Side.RIGHT if right else Side.LEFT))
        pair = (None, p) if right else (p, None)
        if restore and old is not None and k % interval == 0:
            former = (None, old) if right else (old, None)
            m = references.down(references.up(m, *former), *pair)
            v = references.down(references.up(v.sqrt(), *former), *pair).square()
        m, v, step = adam(references.down(g, *pair), m, v, k, lr)
        w = w - scale * references.up(step, *pair)
    return w


def convolutions(
    grads: list[Tensor],
    weight: Tensor,
    fit: Callable[[Tensor], tuple[Tensor, ...]],
    *,
    interval: int,
    factor: int,
    restore: bool,
    lr: float,
) -> Tensor:
    """The 4-D weight after these gradients; factors' gradients don't pile up, see `coap`."""
    w = weight.clone()
    m = v = torch.zeros((), dtype=w.dtype)
    bases: tuple[Tensor, ...] = ()
    letters = "ab"[: 1 if w.shape[-1] == 1 else 2]

    def down(x: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
        for axis, each in zip(letters, factors, strict=True):
            x = torch.einsum(f"abcd,{axis}r->" + "abcd".replace(axis, "r"), x, each)
        return x

    def up(x: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
        return down(x, tuple(each.T for each in factors))

    for k, g in enumerate(grads):
        old = bases
        if k % (interval * factor) == 0:
            bases = fit(g)
        elif k % interval == 0:
            leaves = tuple(b.clone().requires_grad_() for b in bases)
            loss = functional.mse_loss(up(down(g, leaves), leaves), g)
            loss = loss * (1 - functional.cosine_similarity(up(m, leaves), g, dim=1).mean())
            steps = torch.autograd.grad(loss, leaves)
            bases = tuple(b - 0.1 * clipped(s) for b, s in zip(bases, steps, strict=True))
        if restore and old and k % interval == 0:
            m, v = down(up(m, old), bases), down(up(v.sqrt(), old), bases).square()
        m, v, step = adam(down(g, bases), m, v, k, lr)
        w = w - up(step, bases)
    return w
