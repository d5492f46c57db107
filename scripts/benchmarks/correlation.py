"""COAP's update of a basis, in two ways: closed form as the optimizer does it, and by autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from lowrank.optimizers.engine.geometry import Side
from lowrank.optimizers.projectors.correlation import correlation_step

from .workload import Workload

_STEP = 0.1


def problems(work: Workload, gradients: Sequence[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Gradient, basis (d x r) and moment of each matrix; the moment lies near the projection."""
    generator = torch.Generator().manual_seed(work.seed)
    made = []
    for grad_mn in gradients:
        m, n = grad_mn.shape
        basis_dr = torch.linalg.qr(torch.randn(min(m, n), work.rank, generator=generator)).Q
        low = grad_mn @ basis_dr if m >= n else basis_dr.mT @ grad_mn
        noise = torch.randn(low.shape, generator=generator) * low.std()
        made.append((grad_mn, basis_dr, 0.1 * (low + noise)))
    return made


def in_closed_form(work: Workload, gradients: Sequence[Tensor]) -> Callable[[], None]:
    """Our update of every basis."""
    wanted = problems(work, gradients)

    @torch.no_grad()
    def call() -> None:
        for grad_mn, basis_dr, moment in wanted:
            m, n = grad_mn.shape
            side = Side.RIGHT if m >= n else Side.LEFT
            correlation_step(grad_mn, basis_dr, moment, side, _STEP)

    return call


def autograd_gradient(grad_mn: Tensor, basis_dr: Tensor, moment: Tensor) -> Tensor:
    """What `correlation_gradient` gives, from torch and the loss as the paper writes it; d x r.

    Args:
        grad_mn: the gradient.
        basis_dr: a leaf that requires a gradient, n x r where m >= n, else m x r.
        moment: m x r where m >= n, else r x n.
    """
    if grad_mn.shape[0] >= grad_mn.shape[1]:
        rebuilt_mn = grad_mn @ basis_dr @ basis_dr.mT
        moved_mn = moment @ basis_dr.mT
    else:
        rebuilt_mn = basis_dr @ (basis_dr.mT @ grad_mn)
        moved_mn = basis_dr @ moment
    error = functional.mse_loss(rebuilt_mn, grad_mn)
    cosine = functional.cosine_similarity(moved_mn, grad_mn, dim=1).mean()
    (grad_dr,) = torch.autograd.grad(error * (1 - cosine), basis_dr)
    return grad_dr


def by_autograd(work: Workload, gradients: Sequence[Tensor]) -> Callable[[], None]:
    """The same loss differentiated by torch, as the paper describes the update."""
    wanted = problems(work, gradients)

    def call() -> None:
        for grad_mn, basis_dr, moment in wanted:
            basis = basis_dr.clone().requires_grad_()
            grad_dr = autograd_gradient(grad_mn, basis, moment)
            norm = torch.linalg.vector_norm(grad_dr)
            with torch.no_grad():
                basis.sub_(grad_dr * (_STEP * (1 / (norm + 1e-6)).clamp(max=1.0)))

    return call
