"""COAP's projector: a basis updated by gradient descent and re-projected at longer intervals.

Chen et al., "COAP: Memory-Efficient Training with Correlation-Aware Gradient Projection" (arXiv
2412.00071). At multiples of the interval, with R the projected gradient, M the first moment before
this step's update, and the back-projections Ghat = P R and Mhat = P M (left) or R P^T and M P^T:

    L(P) = L1 L2,    L1 = ||Ghat - G||^2 / (m n),    L2 = 1 - mean_i cos(Mhat_i, G_i)
    g = dL/dP, scaled down to norm 1 at most;    P <- P - coap_lr g

with the cosine over rows of the whole matrix on both sides. At every `reproject_factor`-th multiple
P becomes the right (left) singular vectors of Q^T G, Q = orth(G P): a warm-started sketch; at the
first step the sketch is Gaussian. In closed form with K = P^T P a step takes 6 m n r: one GEMM for
R and one with G for [R | w M], and nothing of size m x n (`correlation_gradient`).

The released code's P step depends on the gradient's scale: at that of language models (entries of
1e-3 and less) it leaves P unchanged, and COAP is the re-projection alone. With
`normalize_gradient=True` the step uses G sqrt(m n) / ||G||. Memory: min(m, n) r entries.
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..engine import checks
from ..engine.chunks import wide_dtype
from ..engine.devices import on_gpu
from ..engine.geometry import Geometry, RowRange, Side
from ..engine.rotation import Rotation
from ..engine.seeds import draw_seed
from ..schedules.base import passed
from . import apply, subspace, tucker
from .base import Bases, ProjectedParam, Projector
from .norms import axis_norms
from .random import gaussian
from .reprojection import reprojected
from .singular import align_signs

#: Seed of the first sketch in the released code, which `refresh="svd"` reproduces.
SKETCH_SEED = 3407
#: Lower bound of norms in torch's cosine similarity.
EPS = 1e-8


def correlation_gradient(
    grad_mn: Tensor,
    basis_dr: Tensor,
    moment: Tensor | None,
    side: Side,
    *,
    normalize: bool = False,
    dtype: torch.dtype | None = None,
    rows: RowRange | None = None,
) -> Tensor:
    """The gradient of COAP's loss in the basis, d x r, without temporaries of size m x n.

    Args:
        grad_mn: the gradient, or this process's rows of it.
        basis_dr: the basis, m x r on the left, n x r on the right.
        moment: the first moment, r x n or m x r; None omits the factor L2.
        side: the projected axis, LEFT or RIGHT.
        normalize: use G sqrt(m n) / ||G|| instead of G.
        dtype: precision of the GEMMs with G; its own by default.
        rows: the rows of the gradient that are here, if others are on other processes.
    """
    held = RowRange.whole(len(grad_mn)) if rows is None else rows
    m, n = held.total, grad_mn.shape[1]
    left = side is Side.LEFT
    wide = wide_dtype(grad_mn)
    basis = basis_dr.to(wide)
    row_norms = held.assemble(axis_norms(grad_mn, 1)).squeeze(1)
    factor = math.sqrt(m * n) / torch.linalg.vector_norm(row_norms) if normalize else None

    def scaled(tensor: Tensor) -> Tensor:
        tensor = tensor.to(wide)
        return tensor if factor is None else tensor * factor

    row_norms = scaled(row_norms)
    across = Side.RIGHT if left else Side.LEFT

    def gemm(bases: Tensor, which: Side) -> Tensor:
        geometry = Geometry((m, n), which, bases.shape[1])
        projected = apply.project(grad_mn, (bases,), geometry, held, dtype)
        return scaled(held.assemble(projected) if which is Side.RIGHT else projected)

    projected = gemm(basis, side)  # r x n, or m x r
    projected_lr = projected.mT if left else projected  # the long axis first
    gram, square = basis.mT @ basis, projected_lr.mT @ projected_lr
    error = (row_norms.square().sum() - 2 * square.trace() + (gram * square).sum()) / (m * n)
    if moment is None:
        product = gemm(projected_lr.to(grad_mn.dtype), across)
        product_dr = product if left else product.mT
        gram.diagonal().sub_(2.0)
        return (basis @ square).addmm_(product_dr, gram).mul_(2.0 / (m * n))
    moment_lr = scaled(moment.mT if left else moment)
    if left:
        wanted = torch.cat((projected_lr, moment_lr), dim=1)
        product_dr, aligned_dr = gemm(wanted.to(grad_mn.dtype), across).chunk(2, dim=1)
        inner = moment_lr.mT @ moment_lr
        turned = basis @ inner
        dots, moved = (basis * aligned_dr).sum(1), (basis * turned).sum(1)
    else:
        dots, moved = (moment_lr * projected_lr).sum(1), ((moment_lr @ gram) * moment_lr).sum(1)
    moved_norms, norms = moved.clamp(min=0).sqrt().clamp(min=EPS), row_norms.clamp(min=EPS)
    cosines = dots / (moved_norms * norms)
    first = 1.0 / (moved_norms * norms)
    second = torch.where(moved_norms > EPS, cosines / moved_norms.square(), 0.0)
    if left:
        towards = first[:, None] * aligned_dr - second[:, None] * turned
        inner = torch.zeros_like(gram)
    else:
        wanted = torch.cat((projected_lr, first[:, None] * moment_lr), dim=1)
        product_dr, towards = gemm(wanted.to(grad_mn.dtype), across).mT.chunk(2, dim=1)
        inner = moment_lr.mT @ (second[:, None] * moment_lr)
    dissimilarity, share = (1.0 - cosines.mean()) * (2.0 / (m * n)), error / m
    # L2 dL1/dP + L1 dL2/dP, with the products with P combined.
    gram.diagonal().sub_(2.0)
    result = torch.addmm(towards * -share, basis, dissimilarity * square + share * inner)
    return result.addmm_(product_dr, dissimilarity * gram)


def correlation_step(
    grad_mn: Tensor,
    basis_dr: Tensor,
    moment: Tensor | None,
    side: Side,
    lr: float,
    *,
    normalize: bool = False,
    dtype: torch.dtype | None = None,
    rows: RowRange | None = None,
) -> Tensor:
    """The basis after one descent step along `correlation_gradient`, clipped to norm 1."""
    grad_dr = correlation_gradient(
        grad_mn,
        basis_dr,
        moment,
        side,
        normalize=normalize,
        dtype=dtype,
        rows=rows,
    )
    return descend(basis_dr, grad_dr, lr)


def descend(basis_dr: Tensor, grad_dr: Tensor, lr: float) -> Tensor:
    """P - lr g / max(1, ||g||), clipped as by `clip_grad_norm_`, in g's precision."""
    shrink = (1.0 / (torch.linalg.vector_norm(grad_dr) + 1e-6)).clamp(max=1.0)
    moved: Tensor = basis_dr.to(grad_dr.dtype) - lr * shrink * grad_dr
    return moved


def _called(param: ProjectedParam) -> object:
    return param.name or param.geometry.shape


def _warn(failed: str, param: ProjectedParam) -> None:
    warnings.warn(
        f"{failed} at step {param.steps_done}; its previous basis is kept and the refresh "
        "is tried again",
        stacklevel=2,
    )


@dataclass(frozen=True)
class CorrelationProjector(Projector):
    """COAP's basis; see the module.

    Attributes:
        refresh: "svd" keeps the signs of `torch.linalg.svd` (as the released code); any other
            mode aligns them with the previous basis.
        reproject_factor: intervals between re-projections, at least 1.
        coap_lr: step size of P.
        normalize_gradient: scale the gradient to RMS 1 for P's step.
        rank_ratio_cnn: for 4-D weights (`tucker`): ranks are O / sqrt(ratio) and I / sqrt(ratio).
        interval: steps between fits; set by `for_group`.
    """

    OPTIONS: ClassVar[tuple[str, ...]] = (
        "refresh",
        "reproject_factor",
        "coap_lr",
        "normalize_gradient",
        "rank_ratio_cnn",
    )
    DIMENSIONS: ClassVar[tuple[int, ...]] = (2, 4)
    ONE_AXIS: ClassVar[str] = "coap"
    ORTHONORMAL: ClassVar[bool] = False

    refresh: str = "eigh"
    reproject_factor: int = 5
    coap_lr: float = 0.1
    normalize_gradient: bool = False
    rank_ratio_cnn: float | None = None
    interval: int = 32

    def __post_init__(self) -> None:
        checks.integer("reproject_factor", self.reproject_factor, low=1)
        checks.number("coap_lr", self.coap_lr, low=0.0)
        checks.choice("normalize_gradient", self.normalize_gradient, (True, False))
        if self.rank_ratio_cnn is not None:
            checks.number("rank_ratio_cnn", self.rank_ratio_cnn, low=1.0)

    def for_group(self, group: Mapping[str, Any]) -> CorrelationProjector:
        """With the group's interval."""
        return replace(self, interval=group.get("update_proj_gap", self.interval))

    def geometry(self, shape: Sequence[int], rank: int, proj_type: str) -> Geometry:
        """Side, rank and shapes.

        Raises:
            ValueError: both axes are to be projected, or a 4-D weight has no `rank_ratio_cnn`.
        """
        if len(shape) == 4:
            if self.rank_ratio_cnn is None:
                raise ValueError(
                    f"rank_ratio_cnn=None for a weight of shape {tuple(shape)}: accepted are "
                    "matrices, or with a rank_ratio_cnn of at least 1 convolutions too"
                )
            return tucker.geometry(tuple(shape), self.rank_ratio_cnn)
        return super().geometry(shape, rank, proj_type)

    def fit(self, params: Sequence[ProjectedParam]) -> list[Bases | None]:
        """A P step or a re-projection; a zero or non-finite gradient keeps its basis."""
        largest = torch.stack([param.largest_entry().double() for param in params]).tolist()
        usable = [i for i, scale in enumerate(largest) if 0.0 < scale < math.inf]
        again = [i for i in usable if self._reprojects(params[i])]
        plain = [i for i in again if not isinstance(params[i].geometry, tucker.TuckerGeometry)]
        made = self._reprojected([params[i] for i in plain])
        found: dict[int, Bases | None] = dict(zip(plain, made, strict=True))
        for i in usable:
            if i not in found:
                found[i] = self._moved(params[i], i in again)
        # Squares of finite gradients may overflow; all later bases would be non-finite too.
        kept = [i for i in usable if found[i] is not None]
        flags = [
            torch.stack([basis.isfinite().all() for basis in found[i] or ()]).all() for i in kept
        ]
        fitted: list[Bases | None] = [None] * len(params)
        for i, finite in zip(kept, torch.stack(flags).tolist() if flags else [], strict=True):
            bases = found[i]
            assert bases is not None
            if finite:
                self.store(params[i], bases)
                fitted[i] = bases
            else:
                _warn(f"the step of the basis of {_called(params[i])} overflowed", params[i])
        return fitted

    def _reprojects(self, param: ProjectedParam) -> bool:
        last = int(param.state["refreshed_at"])
        return passed(self.interval * self.reproject_factor, last, param.steps_done)

    def _moved(self, param: ProjectedParam, again: bool) -> Bases | None:
        """The next bases; those of a matrix take a P step."""
        try:
            if isinstance(param.geometry, tucker.TuckerGeometry):
                return self._fit_tucker(param, again)
            return (self._move(param),)
        except subspace.NotConverged:
            _warn(f"no decomposition of the gradient of {_called(param)} converged", param)
            return None

    def _reprojected(self, params: Sequence[ProjectedParam]) -> list[Bases | None]:
        """Re-projections: on a GPU of matrices of one shape together."""
        found: list[Bases | None] = [None] * len(params)
        kinds: dict[Hashable, list[int]] = defaultdict(list)
        for i, param in enumerate(params):
            alone = None if on_gpu(param.grad) else i
            kinds[(param.geometry, param.grad.dtype, param.rows, alone)].append(i)
        for positions in kinds.values():
            try:
                made = self._reproject([params[i] for i in positions])
            except subspace.NotConverged:
                made = [one for i in positions for one in self._reprojected_alone(params[i])]
            for i, basis in zip(positions, made, strict=True):
                found[i] = None if basis is None else (basis,)
        return found

    def _reprojected_alone(self, param: ProjectedParam) -> list[Tensor | None]:
        try:
            return list(self._reproject([param]))
        except subspace.NotConverged:
            _warn(f"no decomposition of the gradient of {_called(param)} converged", param)
            return [None]

    def _reproject(self, params: Sequence[ProjectedParam]) -> list[Tensor | None]:
        previous = [self.bases(param)[0] if param.fitted else None for param in params]
        sketches = [
            self._sketch(param) if old is None else old
            for param, old in zip(params, previous, strict=True)
        ]
        side, rows = params[0].geometry.side, params[0].rows
        grads = [param.grad for param in params]
        bases = reprojected(grads, sketches, side, self.refresh, rows)
        return [
            basis if old is None or self.refresh == "svd" else align_signs(basis, old)
            for basis, old in zip(bases, previous, strict=True)
        ]

    def _sketch(self, param: ProjectedParam) -> Tensor:
        ((d, r),) = param.geometry.basis_shapes.values()
        if self.refresh == "svd":
            generator = torch.Generator().manual_seed(SKETCH_SEED)
            return torch.randn(d, r, generator=generator).to(param.grad.device)
        seed = draw_seed(self.seed, param.seed_name, param.steps_done, "sketch")
        return gaussian((d, r), seed, param.grad)

    def _move(self, param: ProjectedParam) -> Tensor:
        return correlation_step(
            param.grad,
            self.bases(param)[0],
            param.first_moment(),
            param.geometry.side,
            self.coap_lr,
            normalize=self.normalize_gradient,
            dtype=self.dtype,
            rows=param.rows,
        )

    # 4-D weights

    def _fit_tucker(self, param: ProjectedParam, again: bool) -> Bases:
        if again:
            return tucker.decompose(param.grad, param.geometry)
        previous = self.bases(param)
        moment = param.first_moment()
        grads = tucker.gradients(param.grad, previous, moment, normalize=self.normalize_gradient)
        pairs = zip(previous, grads, strict=True)
        return tuple(descend(basis, grad, self.coap_lr) for basis, grad in pairs)

    def project(self, param: ProjectedParam) -> Tensor:
        """The projected gradient, or the core of a 4-D one."""
        if isinstance(param.geometry, tucker.TuckerGeometry):
            return tucker.down(param.grad, self.bases(param))
        return super().project(param)

    def project_together(self, params: Sequence[ProjectedParam]) -> Tensor:
        """See `Projector.project_together`."""
        dtype, known = params[0].grad.dtype, any(p.projected is not None for p in params)
        if known or self.dtype not in (None, dtype):
            return super().project_together(params)
        return self._products(params)

    def write_back(
        self,
        param: ProjectedParam,
        weight_kn: Tensor,
        rows: RowRange,
        direction: Tensor,
        *,
        alpha: float,
        decay_factor: float,
    ) -> None:
        """See `Projector.write_back`."""
        if isinstance(param.geometry, tucker.TuckerGeometry):
            tucker.write_back(
                weight_kn,
                direction,
                self.bases(param),
                rows,
                alpha=alpha,
                decay_factor=decay_factor,
            )
        else:
            super().write_back(
                param, weight_kn, rows, direction, alpha=alpha, decay_factor=decay_factor
            )

    def rotation(self, param: ProjectedParam, previous: Bases) -> Rotation:
        """See `Projector.rotation`."""
        if isinstance(param.geometry, tucker.TuckerGeometry):
            return tucker.rotation(self.bases(param), previous)
        return super().rotation(param, previous)
