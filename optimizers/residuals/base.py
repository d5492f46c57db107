"""The residual interface: from a rule's update in the subspace to the weight update."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..engine.geometry import Geometry, RowRange
from ..projectors import ProjectedParam, Projector
from ..rules import Update


@dataclass(frozen=True)
class ScaledPart:
    """A scaled gradient that is subtracted from a weight: W <- W - alpha factors o G.

    Attributes:
        factors: (1 or k, 1 or n), broadcast over the parameter's rows; in fp32 for an fp16 weight.
        alpha: step size.
        gated: where a factor is 0 nothing is taken of G, which may be NaN there.
    """

    factors: Tensor
    alpha: float
    gated: bool = False

    def of(self, rows: RowRange, held: RowRange) -> Tensor:
        """The factors of some of this process's rows."""
        if self.factors.shape[0] == 1:
            return self.factors
        return self.factors[rows.start - held.start : rows.stop - held.start]


#: Adds a part that is not a back-projection to rows of a weight: (rows of the weight, range).
RowEdit = Callable[[Tensor, RowRange], None]


@dataclass(frozen=True)
class WeightUpdate:
    """An update of a weight: W <- decay_factor W - alpha (back-projected direction), then `edit`.

    Attributes:
        direction: a tensor of the projected gradient's shape, or None for no back-projection.
        alpha: its step size; a 0-d tensor where it is only known on the device.
        decay_factor: 1 less the weight decay.
        scaled: a scaled gradient, subtracted after that.
        edit: called with each chunk of the weight's rows after that.
    """

    direction: Tensor | None
    alpha: float | Tensor
    decay_factor: float | Tensor
    scaled: ScaledPart | None = None
    edit: RowEdit | None = None


@dataclass(frozen=True)
class Residual(ABC):
    """A stateless strategy; all its tensors are in the parameter's flat state.

    Attributes:
        scale: factor on the back-projected update (GaLore's alpha).
    """

    #: Options that a group may set: the names of this class's fields.
    OPTIONS: ClassVar[tuple[str, ...]] = ()
    #: Whether it uses the norms of the projected gradient and update along the projected axis.
    NORMS: ClassVar[bool] = False
    #: Whether it uses the gradient outside the subspace.
    READS_GRADIENT: ClassVar[bool] = True
    #: Whether it reads the projected gradient.
    READS_PROJECTED: ClassVar[bool] = True
    #: Whether its update has a part that is back-projected.
    BACK_PROJECTS: ClassVar[bool] = True
    #: Whether `compute_together` heeds flags on the device. The general one does for residuals
    #: without an `edit`, or one that leaves out gradients that aren't finite.
    GATES: ClassVar[bool] = False
    #: Entries of its state that `compute_update` advances with the gradient.
    ADVANCES: ClassVar[tuple[str, ...]] = ()
    #: Numbers of dimensions of the parameters it accepts.
    DIMENSIONS: ClassVar[tuple[int, ...]] = (2,)
    #: Entries of its state that have the weight's shape, and are spread over processes as it is.
    WHOLE: ClassVar[tuple[str, ...]] = ()

    scale: float = 0.25

    def for_group(self, group: Mapping[str, Any]) -> Residual:
        """This residual with the other values that it reads from a group (a decay rate)."""
        return self

    def check(self, geometry: Geometry, projector: Projector) -> None:  # noqa: B027 (optional)
        """Raises `ValueError` if this residual is undefined for a matrix."""

    def init(self, geometry: Geometry, like: Tensor) -> dict[str, Any]:
        """State entries of a new matrix."""
        return {}

    def state_bytes(self, geometry: Geometry, itemsize: int, world: int = 1) -> int:
        """Bytes of these entries on the first of `world` processes.

        Args:
            geometry: of the whole matrix.
            itemsize: bytes of the parameter's entries.
            world: number of processes that its rows are spread over.
        """
        return 0

    def step_traffic(self, geometry: Geometry, itemsize: int, world: int) -> int:
        """Bytes that a process hands to collectives for a matrix with spread rows."""
        return 0

    def prepare(self, params: Sequence[ProjectedParam]) -> None:  # noqa: B027 (optional)
        """Called before a step's refreshes; may replace each `grad`."""

    @abstractmethod
    def compute_update(
        self, param: ProjectedParam, projected: Tensor, update: Update, projector: Projector
    ) -> WeightUpdate:
        """The weight update; advances the residual's own state.

        Args:
            param: the matrix and its gradient.
            projected: the projected gradient.
            update: the rule's update.
            projector: the projector, for norms and bases of the subspace.
        """

    def compute_together(
        self,
        params: Sequence[ProjectedParam],
        projected_b: Tensor,
        update: Update,
        projector: Projector,
        good_b: Tensor | None = None,
    ) -> list[WeightUpdate]:
        """`compute_update` of B matrices of one geometry, for GPUs.

        Args:
            params: the matrices.
            projected_b: their projected gradients, B x ..., read only; overwritten before if it
                doesn't read them (`READS_PROJECTED`).
            update: see `UpdateRule.update_together`; its direction may be overwritten.
            projector: their projector.
            good_b: flags on the device: other gradients count as zero, what `ADVANCES` names stays;
                only given if it `GATES`.
        """
        updates = zip(params, projected_b.unbind(0), apart(update, len(params)), strict=True)
        if good_b is None:
            return [
                self.compute_update(param, projected, own, projector)
                for param, projected, own in updates
            ]
        return [
            self.compute_gated(param, projected, own, projector, good)
            for (param, projected, own), good in zip(updates, good_b.unbind(0), strict=True)
        ]

    def compute_gated(
        self,
        param: ProjectedParam,
        projected: Tensor,
        update: Update,
        projector: Projector,
        good: Tensor,
    ) -> WeightUpdate:
        """`compute_update` that takes nothing of a gradient whose flag on the device isn't set."""
        former = {key: param.state[key].clone() for key in self.ADVANCES if key in param.state}
        made = gated(self.compute_update(param, projected, update, projector), good)
        for key, value in former.items():
            param.state[key].copy_(torch.where(good, param.state[key], value))
        return made


def gated(update: WeightUpdate, good: Tensor) -> WeightUpdate:
    """An update without direction and scaled gradient unless a flag on the device is set."""
    direction, scaled = update.direction, update.scaled
    if direction is not None:
        direction = torch.where(good, direction, 0.0)
    if scaled is not None:
        scaled = ScaledPart(torch.where(good, scaled.factors, 0.0), scaled.alpha, gated=True)
    return replace(update, direction=direction, scaled=scaled)


def apart(update: Update, count: int) -> list[Update]:
    """The updates of single matrices, views of one of several."""

    def single(value: Any, place: int) -> Any:
        if not isinstance(value, Tensor) or value.dim() < 3:
            return value
        own = value[place if len(value) > 1 else 0]
        return own.view(()) if own.numel() == 1 else own

    return [
        replace(
            update,
            direction=update.direction[i],
            alpha=single(update.alpha, i),
            decay_factor=single(update.decay_factor, i),
            factor=single(update.factor, i),
            rate=single(update.rate, i),
            norms=None if update.norms is None else (update.norms[0][i], update.norms[1][i]),
        )
        for i in range(count)
    ]


@dataclass(frozen=True)
class Dropped(Residual):
    """Nothing outside the subspace is used (GaLore)."""

    READS_GRADIENT: ClassVar[bool] = False
    READS_PROJECTED: ClassVar[bool] = False
    GATES: ClassVar[bool] = True
    DIMENSIONS: ClassVar[tuple[int, ...]] = (2, 4)

    def compute_update(
        self, param: ProjectedParam, projected: Tensor, update: Update, projector: Projector
    ) -> WeightUpdate:
        """The back-projected update alone."""
        return WeightUpdate(update.direction, update.alpha * self.scale, update.decay_factor)

    def compute_together(
        self,
        params: Sequence[ProjectedParam],
        projected_b: Tensor,
        update: Update,
        projector: Projector,
        good_b: Tensor | None = None,
    ) -> list[WeightUpdate]:
        """See `Residual.compute_together`."""
        alpha: float | Tensor = update.alpha * self.scale
        if isinstance(alpha, Tensor):
            update, alpha = replace(update, direction=update.direction.mul_(alpha)), 1.0
        decay_factor = update.decay_factor
        if not isinstance(decay_factor, Tensor):
            directions = update.direction.unbind(0)
            return [WeightUpdate(direction, alpha, decay_factor) for direction in directions]
        return [
            WeightUpdate(own.direction, alpha, own.decay_factor)
            for own in apart(update, len(params))
        ]
