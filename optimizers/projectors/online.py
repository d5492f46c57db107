"""Online PCA: a basis that takes one optimizer step on its loss at each training step.

Liang et al., "Memory-Efficient LLM Training with Online Subspace Descent", NeurIPS 2024 (arXiv
2408.12857). For a left projection (P of m x r; a right one is the same on G^T), Ghat = G / ||G||:

    L(P) = ||P P^T Ghat - Ghat||^2 + lambda ||P^T P - I||^2
    dL/dP = 2 (P Rhat Rhat^T - 2 C + C P^T P) + 4 lambda P (P^T P - I)
    Rhat = P^T Ghat,  C = Ghat Rhat^T

The projection gives Rhat, so a step costs one more GEMM, 2 m n r, and nothing of size m x n. P
starts at the first gradient's singular vectors and is updated after the weights, with the step size

    lr_P = online_lr lr / lr_0,    online_lr = 1 / update_proj_gap unless given

lr_0 is the learning rate that the group was made with: lr_P follows warmup and decay. The released
code has lambda = 0; the paper lambda = 0.1 and online_lr = 5 lr_0.

Memory: min(m, n) r for P and as much for each moment of its optimizer: two for AdamW, one for Lion,
none for SGD.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..engine import checks
from ..engine.devices import capturing, on_gpu
from ..engine.fp32 import exact_fp32
from ..engine.geometry import Geometry, RowRange, Side
from ..rules import Adam, Adam8bit, Lion, Momentum, UpdateRule
from ..rules.precision import MOMENT_DTYPES
from ..storage.base import DenseBasis
from . import apply
from .base import Bases, ProjectedParam
from .norms import NORM_BYTES, axis_norms, gradient_norms_together, safe_norm, safe_norms
from .singular import SingularProjector

PREFIX = "basis_"
#: Accepted values of the option `online_optimizer`.
ONLINE_OPTIMIZERS = ("adamw", "sgd", "lion", "adam8bit")


def total_norm(grad: Tensor, rows: RowRange) -> Tensor:
    """||G||, 0-d, in fp32 (fp64 for fp64), safe where its square would overflow."""
    norms = axis_norms(grad, 1)
    return safe_norm(norms, rows.processes)


@dataclass(frozen=True)
class OnlineProjector(SingularProjector):
    """A basis that is updated with each gradient after its first fit.

    Attributes:
        online_optimizer: P's optimizer, one of `ONLINE_OPTIMIZERS`: torch's AdamW (weight decay
            0.01), plain SGD, Lion, or Adam with 8-bit moments.
        online_lr: its learning rate before the group's schedule; None is 1 / update_proj_gap.
        orthogonality: lambda, weight of the penalty ||P^T P - I||^2.
        rate: P's learning rate at this step; set by `for_group`.
        moments_dtype: precision of its optimizer's moments; set by `for_group`.
    """

    ONE_AXIS: ClassVar[str] = "online"
    OPTIONS: ClassVar[tuple[str, ...]] = (
        *SingularProjector.OPTIONS,
        "online_optimizer",
        "online_lr",
        "orthogonality",
    )
    TRACKS: ClassVar[bool] = True
    ORTHONORMAL: ClassVar[bool] = False

    online_optimizer: str = "adamw"
    online_lr: float | None = None
    orthogonality: float = 0.0
    rate: float | Tensor = 0.0
    moments_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        checks.choice("online_optimizer", self.online_optimizer, ONLINE_OPTIMIZERS)
        if self.online_lr is not None:
            checks.number("online_lr", self.online_lr, low=0.0)
        checks.number("orthogonality", self.orthogonality, low=0.0)

    def for_group(self, group: Mapping[str, Any]) -> OnlineProjector:
        """With P's learning rate of this step.

        Raises:
            ValueError: moments="reset", which would zero the moments at every step.
        """
        if group.get("moments") == "reset":
            raise ValueError(
                "moments='reset' with projector='online': accepted are 'keep', 'restore' and "
                "'rotate'; the subspace moves at every step"
            )
        rate = self.online_lr
        if rate is None:
            rate = 1.0 / group.get("update_proj_gap", 200)
        lr, base = group.get("lr"), group.get("base_lr")
        if base is not None:
            checks.number("base_lr", base, low=0.0)
        if lr is not None and base:
            rate *= lr / base
        return replace(self, rate=rate, moments_dtype=MOMENT_DTYPES[group["moments_dtype"]])

    def _rule(self, *, capturable: bool, fused: bool) -> UpdateRule:
        if self.online_optimizer == "sgd":
            return Momentum(self.rate, momentum=0.0, capturable=capturable)
        if self.online_optimizer == "lion":
            return Lion(self.rate, capturable=capturable, moments_dtype=self.moments_dtype)
        if self.online_optimizer == "adam8bit":
            return Adam8bit(self.rate, capturable=capturable, fused=fused)
        return Adam(
            self.rate,
            weight_decay=0.01,
            capturable=capturable,
            fused=fused,
            moments_dtype=self.moments_dtype,
        )

    def init(self, geometry: Geometry, like: Tensor) -> dict[str, Any]:
        """A zero basis and the state of its optimizer under keys that begin with "basis_"."""
        (shape,) = geometry.basis_shapes.values()
        moments = self._rule(capturable=False, fused=False).init(shape, like)
        return super().init(geometry, like) | {PREFIX + key: v for key, v in moments.items()}

    def state_bytes(self, geometry: Geometry, itemsize: int) -> int:
        """The basis and its optimizer's state."""
        (shape,) = geometry.basis_shapes.values()
        moments = self._rule(capturable=False, fused=False).state_bytes(shape, itemsize)
        return super().state_bytes(geometry, itemsize) + moments

    def fit(self, params: Sequence[ProjectedParam]) -> list[Bases | None]:
        """Singular vectors of the gradient; resets the state of P's optimizer."""
        fitted = super().fit(params)
        for param, bases in zip(params, fitted, strict=True):
            if bases is not None:
                self._reset(param)
        return fitted

    def received(self, param: ProjectedParam) -> None:
        """Resets the state of P's optimizer, as `fit`."""
        super().received(param)
        self._reset(param)

    def step_traffic(self, geometry: Geometry, itemsize: int, world: int) -> int:
        """See `Projector.step_traffic`: the gradient's norm and its product with R."""
        norm, (m, n), rank = NORM_BYTES * max(itemsize, 4) // 4, geometry.shape, geometry.rank
        if geometry.side is Side.LEFT:
            return norm + -(-m // world) * rank * itemsize
        return norm + (rank * rank + n * rank) * itemsize

    def _reset(self, param: ProjectedParam) -> None:
        (shape,) = param.geometry.basis_shapes.values()
        fresh = self._rule(capturable=False, fused=False).init(shape, param.weight)
        for key, value in fresh.items():
            param.state[PREFIX + key].copy_(value)

    def _moments(self, param: ProjectedParam) -> dict[str, Any]:
        """The state of P's optimizer, under its rule's keys."""
        return {
            key.removeprefix(PREFIX): value
            for key, value in param.state.items()
            if key.startswith(PREFIX + "exp_avg")
        }

    def gradient(self, param: ProjectedParam, projected: Tensor) -> Tensor:
        """The gradient of the loss in the basis, d x r, from one GEMM with G.

        Args:
            param: its matrix and gradient.
            projected: the gradient projected by the current basis.
        """
        (basis_dr,) = self.bases(param)
        basis_dr = basis_dr.to(projected.dtype)
        norm = total_norm(param.grad, param.rows).to(projected.dtype)
        norm = norm.clamp_(min=torch.finfo(projected.dtype).tiny)
        hat = (projected / norm).contiguous()
        m, n = param.geometry.shape
        local = RowRange(0, param.grad.shape[0], param.rows.processes)
        if param.geometry.side is Side.LEFT:
            square_rr = hat @ hat.mT
            whole = Geometry((m, n), Side.RIGHT, param.geometry.rank)
            product = apply.project(param.grad, (hat.mT,), whole, local, self.dtype)
            product_dr = param.rows.assemble(product)
        else:
            square_rr = param.rows.processes.sum(hat.mT @ hat)
            whole = Geometry((m, n), Side.LEFT, param.geometry.rank)
            product_dr = apply.project(param.grad, (hat,), whole, local, self.dtype).mT
        product_dr = product_dr / norm
        gram_rr = basis_dr.mT @ basis_dr
        result = torch.addmm(product_dr, basis_dr, square_rr, beta=-2.0).addmm_(product_dr, gram_rr)
        result.mul_(2.0)
        if self.orthogonality:
            gram_rr.diagonal().sub_(1.0)
            result.addmm_(basis_dr, gram_rr, alpha=4.0 * self.orthogonality)
        return result

    @exact_fp32()
    def track(self, param: ProjectedParam, projected: Tensor) -> None:
        """One step of P's optimizer; none at the step that fitted it."""
        refreshed = int(param.state["refreshed_at"])
        if not param.fitted or (not capturing() and param.steps_done == refreshed):
            return
        count: Tensor = param.state["step"]
        moved_dr = self.bases(param)[0].clone()
        grad_dr = self.gradient(param, projected)
        if param.good is not None:
            grad_dr.masked_fill_(param.good.logical_not(), 0.0)
        rule = self._rule(capturable=count.is_cuda, fused=moved_dr.dtype == grad_dr.dtype)
        # The number of tracking steps of this basis, including this one.
        state = {**self._moments(param), "step": count - (1 + refreshed)}
        rule.apply([grad_dr], [state], [moved_dr])
        self.store(param, (moved_dr,))

    def _gradients_together(
        self, params: Sequence[ProjectedParam], projected_b: Tensor, basis_b: Tensor
    ) -> Tensor:
        """`gradient` of B matrices, B x d x r: one product with each G, all else batched.

        The projected gradients are overwritten.
        """
        left, precision = params[0].geometry.side is Side.LEFT, projected_b.dtype
        norms_b = safe_norms(gradient_norms_together(params, 1), precision)
        norms_b.clamp_(min=torch.finfo(precision).tiny)
        hat_b = projected_b.div_(norms_b)
        product_b = torch.empty_like(basis_b, dtype=precision)
        basis_b = basis_b.to(precision)
        if left:
            square_b = hat_b @ hat_b.mT
            for param, hat, out in zip(params, hat_b.unbind(0), product_b.unbind(0), strict=True):
                torch.mm(param.grad, hat.mT, out=out)
        else:
            square_b = hat_b.mT @ hat_b
            for param, hat, out in zip(params, hat_b.unbind(0), product_b.unbind(0), strict=True):
                torch.mm(param.grad.mT, hat, out=out)
        product_b.div_(norms_b)
        gram_b = basis_b.mT @ basis_b
        result_b = torch.baddbmm(product_b, basis_b, square_b, beta=-4.0, alpha=2.0)
        result_b.baddbmm_(product_b, gram_b, alpha=2.0)
        if self.orthogonality:
            gram_b.diagonal(dim1=1, dim2=2).sub_(1.0)
            result_b.baddbmm_(basis_b, gram_b, alpha=4.0 * self.orthogonality)
        return result_b

    @property
    def gates(self) -> bool:
        """See `Projector.gates`."""
        return True

    def tracking_bytes(self, geometry: Geometry, itemsize: int) -> int:
        """See `Projector.tracking_bytes`: basis, product and gradient, and two squares."""
        ((size, rank),) = geometry.basis_shapes.values()
        return itemsize * rank * (3 * size + 2 * rank)

    @exact_fp32()
    def track_together(
        self,
        params: Sequence[ProjectedParam],
        projected_b: Tensor,
        good_b: Tensor | None = None,
    ) -> None:
        """See `Projector.track_together`."""
        if self.dtype is not None or self.storage != DenseBasis():
            super().track_together(params, projected_b, good_b)
            return
        groups: dict[int, list[int]] = defaultdict(list)
        for i, param in enumerate(params):
            refreshed = int(param.state["refreshed_at"])
            if param.fitted and (capturing() or param.steps_done != refreshed):
                groups[refreshed].append(i)
        for refreshed, picked in groups.items():
            if len(picked) < len(params):
                own = [params[i] for i in picked]
                flags = None if good_b is None else torch.stack([good_b[i] for i in picked])
                self._move(own, torch.stack([projected_b[i] for i in picked]), flags, refreshed)
            else:
                self._move(params, projected_b, good_b, refreshed)

    def _move(
        self,
        params: Sequence[ProjectedParam],
        projected_b: Tensor,
        good_b: Tensor | None,
        refreshed: int,
    ) -> None:
        """One step of the optimizer of bases that were fitted after as many steps."""
        ((key, _),) = params[0].geometry.basis_shapes.items()
        stored: list[Tensor] = [param.state[key] for param in params]
        grads_b = self._gradients_together(params, projected_b, torch.stack(stored))
        if good_b is not None:
            grads_b.masked_fill_(good_b.logical_not().view(-1, 1, 1), 0.0)
        rule = self._rule(capturable=on_gpu(params[0].state["step"]), fused=True)
        # The numbers of tracking steps of these bases, including this one.
        counts = torch.stack([param.state["step"] for param in params]).sub_(1 + refreshed)
        states = [
            {**self._moments(param), "step": count}
            for param, count in zip(params, counts.unbind(0), strict=True)
        ]
        rule.apply(list(grads_b.unbind(0)), states, stored)
        for param in params:
            param.read = None
