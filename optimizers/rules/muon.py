"""Muon: momentum orthogonalised by a Newton-Schulz iteration (Jordan et al., 2024).

    M <- M + (1 - momentum) (G - M),  U = G + momentum (M - G) with Nesterov, else M
    X0 = U / ||U||,  X <- a X + (b A + c A A) X with A = X X^T, five times
    W <- (1 - lr wd) W - lr s X,  s = sqrt(max(1, m / n)) or 0.2 sqrt(max(m, n)) (`match_rms_adamw`,
    Liu et al., 2025, arXiv 2502.16982: an update of AdamW's RMS, so that both can share a rate)

Memory: m n entries of `moments_dtype`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..engine.chunks import wide_dtype
from ..engine.devices import on_gpu
from ..engine.rotation import Rotation
from ..engine.scratch import bounded_batches, device_scratch
from ..engine.sharding import Part, part_of
from .base import MOMENT_TRANSPORTS, State, Update, UpdateRule, numel, scalar
from .precision import moments_dtype, moments_itemsize
from .updates import picked

ADJUSTMENTS = ("original", "match_rms_adamw")
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrix_mn: Tensor, steps: int, part: Part | None = None) -> Tensor:
    """Approximates U V^T of a matrix U S V^T: singular values end between about 0.7 and 1.2.

    Runs in bf16 on CUDA and in fp32 (fp64 for fp64 input) elsewhere.

    Args:
        matrix_mn: the matrix, or this process's part of it.
        steps: number of iterations.
        part: the part. Its Gram matrix is the one along the axis that is not spread: a sum.
    """
    a, b, c = COEFFICIENTS
    part = part or Part.whole(matrix_mn.shape)
    tall = matrix_mn.shape[0] > matrix_mn.shape[1] if part.spread.alone else part.axis == 0
    x = matrix_mn.mT if tall else matrix_mn
    if on_gpu(x):
        x = x.bfloat16()
    elif x.dtype != torch.float64:
        x = x.float()
    norm = torch.linalg.vector_norm(x)
    if not part.spread.alone:
        norm = part.spread.sum(norm.float().square()).sqrt_()
    x = x / norm.clamp(min=1e-7)
    for _ in range(steps):
        gram = part.spread.sum(x @ x.mT)
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.addmm(x, polynomial, x, beta=a)
    return x.mT if tall else x


def normalise_together(
    matrices_b: Tensor, good_b: Tensor | None = None, out_b: Tensor | None = None
) -> Tensor:
    """B x m x n matrices of norm 1 in bf16 (fp64 for fp64); zero where `good_b` is false.

    Args:
        matrices_b: the matrices.
        good_b: B flags, None for all.
        out_b: takes the result, a new tensor if None.
    """
    norms_b = torch.linalg.vector_norm(matrices_b, dim=(1, 2), keepdim=True).clamp_(min=1e-7)
    if out_b is None:
        kind = torch.float64 if matrices_b.dtype == torch.float64 else torch.bfloat16
        out_b = torch.empty_like(matrices_b, dtype=kind)
    if good_b is None:
        return torch.div(matrices_b, norms_b, out=out_b)
    return torch.mul(matrices_b, good_b.view(-1, 1, 1) / norms_b, out=out_b)


def orthogonalize_together(normed_b: Tensor, steps: int) -> Tensor:
    """`orthogonalize` of B x m x n of norm 1 in their precision, in batched products."""
    a, b, c = COEFFICIENTS
    tall = normed_b.shape[1] > normed_b.shape[2]
    x = normed_b.mT if tall else normed_b
    for _ in range(steps):
        gram_b = x @ x.mT
        polynomial_b = torch.baddbmm(gram_b, gram_b, gram_b, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial_b, x, beta=a)
    return x.mT if tall else x


@dataclass(frozen=True)
class Muon(UpdateRule):
    """Muon on one matrix.

    Attributes:
        lr: learning rate.
        momentum: decay of the first moment.
        nesterov: look ahead by one momentum step.
        ns_steps: Newton-Schulz iterations.
        weight_decay: decoupled, times lr, before the update.
        adjust_lr: one of `ADJUSTMENTS`.
        moments_dtype: precision of the momentum, None for the default (`moments_dtype`).
    """

    matrices_only: ClassVar[bool] = True
    SCRATCH: ClassVar[int] = 3
    transports: ClassVar[tuple[str, ...]] = MOMENT_TRANSPORTS

    lr: float | Tensor
    momentum: float = 0.95
    nesterov: bool = True
    ns_steps: int = 5
    weight_decay: float = 0.0
    adjust_lr: str = "original"
    moments_dtype: torch.dtype | None = None

    def init(self, shape: Sequence[int], like: Tensor) -> State:
        """A zero momentum."""
        dtype = moments_dtype(self.moments_dtype, like.dtype)
        return {"momentum_buffer": torch.zeros(tuple(shape), dtype=dtype, device=like.device)}

    def state_bytes(self, shape: Sequence[int], itemsize: int) -> int:
        """One moment."""
        return numel(shape) * moments_itemsize(self.moments_dtype, itemsize)

    def step_traffic(self, part: Part, itemsize: int) -> int:
        """See `UpdateRule.step_traffic`: a norm, and a Gram matrix in each iteration."""
        if part.axis is None:
            return 0
        side = part.shape[1 - part.axis]
        return 4 + self.ns_steps * side * side * max(itemsize, 4)

    def _size(self, m: int, n: int) -> float:
        if self.adjust_lr == "match_rms_adamw":
            return 0.2 * math.sqrt(max(m, n))
        return math.sqrt(max(1.0, m / n))

    def update(
        self, grads: Sequence[Tensor], states: Sequence[State], weights: Sequence[Tensor]
    ) -> list[Update]:
        """See `UpdateRule.update`."""
        updates = []
        lr = scalar(self.lr)
        for grad, state in zip(grads, states, strict=True):
            stored: Tensor = state["momentum_buffer"]
            moment = stored
            if stored.dtype != grad.dtype:
                wide = wide_dtype(grad)
                moment, grad = stored.to(wide), grad.to(wide)
            moment.lerp_(grad, 1 - self.momentum)
            if moment is not stored:
                stored.copy_(moment)
            ahead = grad.lerp(moment, self.momentum) if self.nesterov else moment
            part = part_of(state)
            direction = orthogonalize(ahead, self.ns_steps, part)
            shape = grad.shape if part is None else part.original_shape
            updates.append(
                Update(direction, lr * self._size(*shape), 1.0 - lr * self.weight_decay, rate=lr)
            )
        return updates

    def scratch_bytes(self, dtype: torch.dtype, state: State, *, overwrites: bool) -> int:
        """See `UpdateRule.scratch_bytes`: what is orthogonalised, and then two iterates."""
        own = dtype.itemsize
        stored: Tensor = state["momentum_buffer"]
        wide = dtype if stored.dtype == dtype else wide_dtype(dtype)
        converted = 0 if stored.dtype == wide else wide.itemsize
        ahead = 0 if overwrites and dtype == wide else wide.itemsize
        kind = torch.float64 if wide == torch.float64 else torch.bfloat16
        normed = 0 if overwrites and dtype == kind else kind.itemsize
        short, long = sorted(stored.shape)
        products = kind.itemsize * (1 + 2 * short / long)  # the next iterate, and two squares
        return math.ceil(own + max(ahead + max(normed, converted), normed + products))

    def update_together(
        self,
        grads_b: Tensor,
        states: Sequence[State],
        weights: Sequence[Tensor],
        axis: int | None = None,
        good_b: Tensor | None = None,
        *,
        overwrites: bool = False,
    ) -> Update:
        """See `UpdateRule.update_together`."""
        ahead_b = self._ahead_together(grads_b, states, overwrites=overwrites)
        narrow = overwrites and grads_b.dtype == torch.bfloat16
        normed_b = normalise_together(ahead_b, good_b, grads_b if narrow else None)
        del ahead_b
        direction_b = orthogonalize_together(normed_b, self.ns_steps)
        lr, (m, n) = scalar(self.lr), grads_b.shape[1:]
        return Update(direction_b, lr * self._size(m, n), 1.0 - lr * self.weight_decay, rate=lr)

    def _ahead_together(
        self, grads_b: Tensor, states: Sequence[State], *, overwrites: bool = False
    ) -> Tensor:
        """Advances the momenta; what is orthogonalised, as one tensor."""
        stored: list[Tensor] = [state["momentum_buffer"] for state in states]
        wide = grads_b.dtype if stored[0].dtype == grads_b.dtype else wide_dtype(grads_b)
        free = overwrites and grads_b.dtype == wide
        ahead_b = grads_b if free else grads_b.to(wide, copy=True)
        ahead = list(ahead_b.unbind(0))
        moments = stored if stored[0].dtype == wide else [moment.to(wide) for moment in stored]
        torch._foreach_lerp_(moments, ahead, 1 - self.momentum)
        if moments is not stored:
            torch._foreach_copy_(stored, moments)
        if self.nesterov:
            torch._foreach_lerp_(ahead, moments, self.momentum)
        else:
            torch._foreach_copy_(ahead, moments)
        return ahead_b

    def bounds_scratch(self, weight: Tensor, state: State) -> bool:
        """See `UpdateRule.bounds_scratch`: in batches of its own."""
        return on_gpu(weight)

    def apply(
        self,
        grads: Sequence[Tensor],
        states: Sequence[State],
        weights: Sequence[Tensor],
        good_b: Tensor | None = None,
    ) -> None:
        """See `UpdateRule.apply`; on a GPU those of one shape together."""
        if not on_gpu(weights[0]) or any(part_of(state) is not None for state in states):
            super().apply(grads, states, weights, good_b)
            return
        lr = scalar(self.lr)
        for batch in _batches(weights):
            given, chosen, own, flags = picked(batch, grads, states, weights, good_b)
            stored: Tensor = chosen[0]["momentum_buffer"]
            kind = own[0].dtype if stored.dtype == own[0].dtype else wide_dtype(own[0])
            grads_b = own[0].new_empty(len(own), *own[0].shape, dtype=kind)
            torch._foreach_copy_(list(grads_b.unbind(0)), given)
            if flags is not None:
                grads_b.masked_fill_(flags.logical_not().view(-1, 1, 1), 0.0)
            normed_b = normalise_together(
                self._ahead_together(grads_b, chosen, overwrites=True), flags
            )
            del grads_b
            direction_b = orthogonalize_together(normed_b, self.ns_steps)
            del normed_b
            directions = direction_b.to(own[0].dtype).contiguous().unbind(0)
            if self.weight_decay:
                torch._foreach_mul_(own, 1.0 - lr * self.weight_decay)
            torch._foreach_add_(own, list(directions), alpha=-lr * self._size(*own[0].shape))

    def first_moment(self, state: State) -> Tensor:
        """The momentum."""
        moment: Tensor = state["momentum_buffer"]
        return moment

    def transport_moments(
        self, state: State, how: str, rotation: Rotation, into: State | None = None
    ) -> None:
        """See `UpdateRule`; with one moment "restore" and "rotate" are the same."""
        moment: Tensor = state["momentum_buffer"]
        moved = torch.zeros_like(moment) if how == "reset" else rotation(moment)
        (into or state)["momentum_buffer"].copy_(moved)


def _batches(weights: Sequence[Tensor]) -> Iterator[list[int]]:
    """Positions of weights of one shape, whose scratch is bounded."""
    kinds: dict[Hashable, list[int]] = defaultdict(list)
    for i, weight in enumerate(weights):
        kinds[(weight.shape, weight.dtype, weight.device)].append(i)
    for positions in kinds.values():
        first = weights[positions[0]]
        # Two iterates and two squares in bf16, or an iterate and the update.
        each = max(first.element_size() + 6, 3 * first.element_size())
        sizes = [each * first.numel()] * len(positions)
        for batch in bounded_batches(sizes, device_scratch(first.device)):
            yield [positions[place] for place in batch]
