"""Tucker-2 projection of convolution weights, O x I x kh x kw: factors for both channel axes.

COAP (arXiv 2412.00071, section on convolutions): with A0 of O x r0 and A1 of I x r1,

    core = G x_0 A0^T x_1 A1^T    (r0 x r1 x kh x kw)
    back-projection: core x_0 A0 x_1 A1

and r0 = O // sqrt(ratio), r1 = I // sqrt(ratio), at least 1. A kernel whose last dimension is 1 has
only A0, with r0 = O // ratio. The factors come from a higher-order orthogonal iteration; at
the refreshes between these they take one step on COAP's loss, with the cosine over the input
channels. Refits make temporaries of the weight's size; other steps work in chunks of output
channels.

Memory: O r0 + I r1 entries, and r0 r1 kh kw for each moment.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from ..engine.chunks import row_chunks, wide_dtype
from ..engine.geometry import Geometry, RowRange, Side
from ..engine.rotation import Rotation
from . import subspace
from .base import Bases

MAX_ITERATIONS = 10
GAIN = 1e-5  # relative gain in captured norm that ends the iteration


@dataclass(frozen=True)
class TuckerGeometry(Geometry):
    """Shapes of a 4-D weight.

    Attributes:
        full: (O, I, kh, kw).
        ranks: (r0, r1), or (r0,) where only the output channels are projected.
    """

    full: tuple[int, ...] = field(default=())
    ranks: tuple[int, ...] = field(default=())

    @property
    def basis_shapes(self) -> dict[str, tuple[int, int]]:
        """A0, and A1 where there is one."""
        keys = ("basis", "basis_right")[: len(self.ranks)]
        pairs = zip(self.full, self.ranks, strict=False)
        return dict(zip(keys, pairs, strict=True))

    def projected_shape(self, local_rows: int | None = None) -> tuple[int, ...]:  # type: ignore[override]
        """The core's shape."""
        return (*self.ranks, *self.full[len(self.ranks) :])


def geometry(shape: tuple[int, ...], ratio: float) -> TuckerGeometry:
    """Ranks and shapes of a 4-D weight."""
    outputs, inputs = shape[:2]
    if shape[-1] == 1:
        ranks: tuple[int, ...] = (int(max(1, outputs // ratio)),)
    else:
        ranks = tuple(int(max(1, size // math.sqrt(ratio))) for size in (outputs, inputs))
    unfolded = (outputs, math.prod(shape[1:]))
    return TuckerGeometry(unfolded, Side.BOTH, min(ranks), full=shape, ranks=ranks)


def _times(tensor: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """The mode product along an axis: that axis is replaced by the rows of `matrix`."""
    product: Tensor = torch.tensordot(tensor, matrix, dims=([axis], [1]))
    return product.movedim(-1, axis)


def down(grad: Tensor, bases: Bases) -> Tensor:
    """The core of a gradient; summed over chunks in the computing precision."""
    left, *others = (basis.to(grad.dtype) for basis in bases)
    shape = (left.shape[1], *(basis.shape[1] for basis in others), *grad.shape[len(bases) :])
    total = torch.zeros(shape[0], math.prod(shape[1:]), dtype=wide_dtype(grad), device=grad.device)
    for span in row_chunks(grad):
        part = grad[span]
        for axis, basis in enumerate(others, start=1):
            part = _times(part, basis.mT, axis)
        total += left[span].mT @ part.flatten(1)
    return total.to(grad.dtype).view(shape)


def write_back(
    weight: Tensor,
    direction: Tensor,
    bases: Bases,
    rows: RowRange,
    *,
    alpha: float,
    decay_factor: float,
) -> None:
    """In place on some output channels: decay the weight, subtract alpha * back-projection."""
    left, *others = (basis.to(weight.dtype) for basis in bases)
    left, flat = left[rows.start : rows.stop], direction.to(weight.dtype).flatten(1)
    if not others and weight.is_contiguous():
        weight.view(len(weight), -1).addmm_(left, flat, beta=decay_factor, alpha=-alpha)
        return
    for span in row_chunks(weight):
        part = (left[span] @ flat).view(-1, *direction.shape[1:])
        for axis, basis in enumerate(others, start=1):
            part = _times(part, basis, axis)
        # Decay and update in one expression, so that a bf16 weight is rounded once.
        weight[span] = part.mul_(-alpha).add_(weight[span], alpha=decay_factor)


def decompose(grad: Tensor, geometry: Geometry) -> Bases:
    """Factors that capture most of a gradient, by higher-order orthogonal iteration."""
    assert isinstance(geometry, TuckerGeometry)
    grad = grad.to(wide_dtype(grad))
    factors = [
        _leading(grad.movedim(axis, 0).flatten(1), rank) for axis, rank in enumerate(geometry.ranks)
    ]
    if len(factors) == 1:
        return (factors[0],)
    kept = float(torch.linalg.vector_norm(down(grad, tuple(factors))))
    for _ in range(MAX_ITERATIONS):
        for axis in (0, 1):
            part = _times(grad, factors[1 - axis].mT, 1 - axis)
            factors[axis] = _leading(part.movedim(axis, 0).flatten(1), geometry.ranks[axis])
        now = float(torch.linalg.vector_norm(down(grad, tuple(factors))))
        if now - kept <= GAIN * now:
            break
        kept = now
    return tuple(factors)


def _leading(unfolded: Tensor, rank: int) -> Tensor:
    """Leading left singular vectors, from the Gram matrix of the channels."""
    scale = torch.linalg.vector_norm(unfolded, torch.inf)
    scaled = unfolded / scale
    _, vectors = subspace.eigh(scaled @ scaled.mT)
    return vectors[:, -rank:].flip(1).contiguous()


def gradients(
    grad: Tensor, bases: Bases, moment: Tensor | None, *, normalize: bool = False
) -> tuple[Tensor, ...]:
    """The gradient of COAP's loss in each factor.

    Args:
        grad: O x I x kh x kw.
        bases: the factors.
        moment: the core's first moment; None omits the cosine.
        normalize: scale the gradient to RMS 1.
    """
    wide = wide_dtype(grad)
    grad = grad.to(wide)
    moment = None if moment is None else moment.to(wide)
    if normalize:
        factor = math.sqrt(grad.numel()) / torch.linalg.vector_norm(grad)
        grad = grad * factor
        moment = None if moment is None else moment * factor
    with torch.enable_grad():
        leaves = [basis.to(wide).detach().clone().requires_grad_() for basis in bases]

        def up(projected: Tensor) -> Tensor:
            for axis, leaf in enumerate(leaves):
                projected = _times(projected, leaf, axis)
            return projected

        loss = functional.mse_loss(up(down(grad, tuple(leaves))), grad)
        if moment is not None:
            loss = loss * (1 - functional.cosine_similarity(up(moment), grad, dim=1).mean())
        return torch.autograd.grad(loss, leaves)


@dataclass(frozen=True)
class TuckerRotation(Rotation):
    """Change of coordinates of a core: `left` along the first axis, `right` along the second."""

    def __call__(self, projected: Tensor) -> Tensor:
        """The core in the new coordinates."""
        for axis, matrix in enumerate((self.left, self.right)):
            if matrix is not None:
                projected = _times(projected, matrix.to(projected.dtype), axis)
        return projected

    def squared(self) -> TuckerRotation:
        """See `Rotation.squared`."""
        return TuckerRotation(*(None if m is None else m.square() for m in (self.left, self.right)))


def rotation(bases: Bases, previous: Bases) -> TuckerRotation:
    """The change of coordinates from the previous factors to the new ones."""
    between = [new.mT @ old.to(new.dtype) for new, old in zip(bases, previous, strict=True)]
    return TuckerRotation(between[0], between[1] if len(between) > 1 else None)
