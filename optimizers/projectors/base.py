"""The projector interface: fitting a subspace, projection and back-projection."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowrank.cuda.noise import Seed

from ..engine.chunks import wide_dtype
from ..engine.geometry import Geometry, RowRange, Side
from ..engine.processes import ALONE, Processes
from ..engine.rotation import Rotation
from ..storage.base import BasisStorage, DenseBasis
from . import apply

Bases = tuple[Tensor, ...]
#: From a slice of a matrix's rows to what of its gradient lies outside a subspace, a new tensor.
RowsOutside = Callable[[slice], Tensor]
#: A parameter, or one with the place of an expert in it.
MatrixKey = Tensor | tuple[Tensor, int]


def no_moment() -> Tensor | None:
    """The `first_moment` of a rule without one."""
    return None


@dataclass
class ProjectedParam:
    """One projected matrix during one step.

    Attributes:
        weight: the parameter, this process's rows of it (k x n).
        grad: its gradient (negated under `maximize`), k x n; not used where `projected` is known.
        state: the parameter's flat state; each key belongs to a projector, schedule, residual or
            rule.
        geometry: global shape, side and rank.
        rows: the rows that this process holds.
        index: position among the optimizer's projected matrices.
        steps_done: steps taken before this one.
        seed_name: the name that seeds its random numbers, see `engine.seeds`.
        name: the parameter's recorded name, if any.
        param: the parameter that `weight` is a part of, None for `weight` itself.
        expert: its place among the matrices that `param` holds, see `engine.experts`.
        first_moment: reads the rule's current first moment, in the projected shape.
        read: cache of the bases during this step; None after they change.
        projected: this process's part of the projected gradient, where only that is known.
        scratch: what a projector leaves for the residual of this step.
        good: a flag on the device, 0-d, where the host doesn't know whether the gradient is finite;
            what counts as zero otherwise is the projected gradient, not `grad`.
        noise: seed and turn of the weight's rounding where only the device knows the step, see
            `weights.rounding_seeds`.
    """

    weight: Tensor
    grad: Tensor
    state: dict[str, Any]
    geometry: Geometry
    rows: RowRange
    index: int
    steps_done: int
    seed_name: str
    name: str | None = None
    param: Tensor | None = None
    expert: int | None = None
    first_moment: Callable[[], Tensor | None] = no_moment
    read: Bases | None = None
    projected: Tensor | None = None
    scratch: dict[str, Tensor] = field(default_factory=dict)
    good: Tensor | None = None
    noise: tuple[Seed, Seed] | None = None

    @property
    def owner(self) -> Tensor:
        """The parameter, as `optimizer.state` knows it."""
        return self.weight if self.param is None else self.param

    @property
    def key(self) -> MatrixKey:
        """What tells the matrix from all others of an optimizer."""
        return self.owner if self.expert is None else (self.owner, self.expert)

    @property
    def across(self) -> Processes:
        """The processes among which the projected gradient's rows are spread, after the step's
        communication: those of the weight's rows for a right projection.
        """
        return self.rows.processes if self.geometry.side is Side.RIGHT else ALONE

    def largest_entry(self) -> Tensor:
        """The gradient's largest absolute entry, over all rows, 0-d; NaN if there is one."""
        return self.rows.processes.largest(apply.largest_entry(self.grad))

    @property
    def fitted(self) -> bool:
        """Whether the matrix has bases yet."""
        return bool(self.state["refreshed_at"] >= 0)


@dataclass(frozen=True)
class Projector(ABC):
    """A stateless strategy; all its tensors are in the parameter's flat state.

    Attributes:
        storage: how bases are stored.
        dtype: precision of the projection GEMMs, the weights' own when None.
        seed: of everything random.
    """

    #: Options that a group may set: the names of this class's fields.
    OPTIONS: ClassVar[tuple[str, ...]] = ()
    #: Numbers of dimensions of the parameters it can project.
    DIMENSIONS: ClassVar[tuple[int, ...]] = (2,)
    #: Whether `track` changes the bases.
    TRACKS: ClassVar[bool] = False
    #: Its name in `PROJECTORS`, where it can't project both axes.
    ONE_AXIS: ClassVar[str] = ""
    #: Whether a fit reads the gradient, so that processes can share it (`share_refreshes`).
    FITS_GRADIENT: ClassVar[bool] = True
    #: Whether bases have orthonormal columns (to the storage's precision).
    ORTHONORMAL: ClassVar[bool] = True

    #: Whether the rows of a matrix may be spread over processes.
    SPREADS: ClassVar[bool] = True

    storage: BasisStorage = field(default_factory=DenseBasis)
    dtype: torch.dtype | None = None
    seed: int = 0

    @property
    def orthonormal(self) -> bool:
        """Whether this projector's bases have orthonormal columns."""
        return self.ORTHONORMAL

    def for_group(self, group: Mapping[str, Any]) -> Projector:
        """This projector with the other values that it reads from a group (a learning rate)."""
        return self

    def geometry(self, shape: Sequence[int], rank: int, proj_type: str) -> Geometry:
        """Side, rank and shapes for a parameter of the given global shape.

        Raises:
            ValueError: both axes are to be projected, and this projector has one (`ONE_AXIS`).
        """
        rows, columns = shape
        geometry = Geometry.of((rows, columns), rank, proj_type)
        if self.ONE_AXIS and geometry.side is Side.BOTH:
            raise ValueError(
                f"proj_type='full' with projector={self.ONE_AXIS!r}: accepted is one projected axis"
            )
        return geometry

    def init(self, geometry: Geometry, like: Tensor) -> dict[str, Any]:
        """State entries of a new matrix: zero bases."""
        state: dict[str, Any] = {}
        for key, shape in geometry.basis_shapes.items():
            state.update(self.storage.init(key, shape, like))
        return state

    def state_bytes(self, geometry: Geometry, itemsize: int) -> int:
        """Bytes of these entries."""
        shapes = geometry.basis_shapes.values()
        return sum(self.storage.state_bytes(shape, itemsize) for shape in shapes)

    def step_traffic(self, geometry: Geometry, itemsize: int, world: int) -> int:
        """Bytes that a process hands to collectives after the update, for spread rows."""
        return 0

    @abstractmethod
    def fit(self, params: Sequence[ProjectedParam]) -> list[Bases | None]:
        """Refits and stores the bases of the given matrices from their gradients (and moments).

        Returns:
            For each parameter its new bases, not rounded by their storage, or None if the previous
            ones are kept.
        """

    def bases(self, param: ProjectedParam) -> Bases:
        """The stored bases, one or (full) two, read once a step."""
        if param.read is None:
            param.read = self._read(param)
        return param.read

    def _read(self, param: ProjectedParam) -> Bases:
        return tuple(self.storage.read(param.state, key) for key in param.geometry.basis_shapes)

    def store(self, param: ProjectedParam, bases: Bases) -> None:
        """Stores the parameter's bases."""
        for key, basis in zip(param.geometry.basis_shapes, bases, strict=True):
            self.storage.write(param.state, key, basis)
        param.read = None

    def stored(self, param: ProjectedParam) -> list[Tensor]:
        """The tensors that hold the bases, for other processes to copy."""
        tensors: list[Tensor] = []
        for key in param.geometry.basis_shapes:
            tensors += self.storage.tensors(param.state, key)
        return tensors

    def received(self, param: ProjectedParam) -> None:
        """Called instead of `fit` where another process fitted and `stored` were copied."""
        param.read = None

    def project(self, param: ProjectedParam) -> Tensor:
        """The projected gradient: r x n, k x r or r x r."""
        return apply.project(param.grad, self.bases(param), param.geometry, param.rows, self.dtype)

    def project_together(self, params: Sequence[ProjectedParam]) -> Tensor:
        """Projected gradients of B matrices of one geometry, as one new tensor (B x ...).

        Each is one product with its gradient, which writes its result where it belongs.
        """
        first = params[0]
        known = any(param.projected is not None for param in params)
        other = self.dtype is not None and self.dtype != first.grad.dtype
        own = type(self).project is not Projector.project
        if known or other or own or first.geometry.side is Side.BOTH:
            return torch.stack(
                [p.projected if p.projected is not None else self.project(p) for p in params]
            )
        return self._products(params)

    def _products(self, params: Sequence[ProjectedParam]) -> Tensor:
        first = params[0]
        shape = first.geometry.projected_shape(first.grad.shape[0])
        projected_b = first.grad.new_empty(len(params), *shape)
        for param, basis, out in zip(
            params, self.bases_together(params), projected_b.unbind(0), strict=True
        ):
            apply.project_into(out, param.grad, basis, param.geometry, param.rows)
        return projected_b

    def bases_together(self, params: Sequence[ProjectedParam]) -> list[Tensor]:
        """The first basis of each of several matrices of one geometry, in its gradient's dtype."""
        if type(self)._read is Projector._read and all(param.read is None for param in params):
            (key,) = params[0].geometry.basis_shapes
            read = self.storage.read_together([param.state for param in params], key)
            for param, basis in zip(params, read, strict=True):
                param.read = (basis,)
        return [self.bases(param)[0].to(param.grad.dtype) for param in params]

    def scratch_bytes(self, geometry: Geometry, itemsize: int) -> int:
        """Bytes that a matrix's bases take during a step besides what is stored.

        Args:
            geometry: of the matrix.
            itemsize: bytes of an entry of its weight.
        """
        return itemsize * sum(map(self.storage.scratch_entries, geometry.basis_shapes.values()))

    def tracking_bytes(self, geometry: Geometry, itemsize: int) -> int:
        """Bytes that `track_together` takes for a matrix besides its projected gradient."""
        return 0

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
        """In place, on some rows: decays the weight, subtracts alpha * back-projected `direction`.

        Args:
            param: the matrix, with its bases.
            weight_kn: these rows of the weight.
            rows: the range of these rows in the whole matrix.
            direction: of the projected gradient's shape, for all of the parameter's rows.
            alpha: step size.
            decay_factor: 1 less the weight decay.
        """
        apply.write_back(
            weight_kn,
            apply.rows_of(direction, param.geometry, param.rows, rows),
            self.bases(param),
            param.geometry,
            rows,
            alpha=alpha,
            decay_factor=decay_factor,
            dtype=self.dtype,
        )

    def back_project(
        self, param: ProjectedParam, rows: RowRange, direction: Tensor
    ) -> Tensor | None:
        """The back-projection of `direction` for some rows in a new fp32 tensor.

        Returns:
            k x n, or None where this projector only writes back in place.
        """
        if self.dtype is not None or type(self).write_back is not Projector.write_back:
            return None
        own = apply.rows_of(direction, param.geometry, param.rows, rows)
        return apply.back_project(own, self.bases(param), param.geometry, rows)

    def rotation(self, param: ProjectedParam, previous: Bases) -> Rotation:
        """The change of coordinates from the previous bases to the parameter's bases."""
        wide = wide_dtype(param.weight)
        pairs = zip(self.bases(param), previous, strict=True)
        between = [new.to(wide).mT @ old.to(wide) for new, old in pairs]
        side = param.geometry.side
        return Rotation(
            left=None if side is Side.RIGHT else between[0],
            right=None if side is Side.LEFT else between[-1],
        )

    def outside(
        self, param: ProjectedParam, projected: Tensor, span: slice, share: float = 1.0
    ) -> Tensor:
        """G - share P R (left) or G - share R P^T (right) for some rows, in a new tensor.

        Args:
            param: the matrix, with its gradient and bases.
            projected: R, the projected gradient.
            span: slice of this process's rows, with explicit start and stop.
            share: factor on the back-projection of R.
        """
        chunk = param.grad[span].clone()
        rows = param.rows.part(span)
        self.write_back(param, chunk, rows, projected, alpha=share, decay_factor=1.0)
        return chunk

    def outside_together(
        self,
        params: Sequence[ProjectedParam],
        projected_b: Tensor,
        good_b: Tensor | None = None,
    ) -> list[RowsOutside]:
        """`outside` of B matrices of one geometry, for GPUs.

        Args:
            params: the matrices.
            projected_b: their projected gradients.
            good_b: flags on the device: where one is false the result is zero.
        """
        bad = [None] * len(params) if good_b is None else good_b.logical_not().unbind(0)

        def of(param: ProjectedParam, projected: Tensor, mask: Tensor | None) -> RowsOutside:
            def rows(span: slice) -> Tensor:
                outside = self.outside(param, projected, span)
                return outside if mask is None else outside.masked_fill_(mask, 0.0)

            return rows

        return list(map(of, params, projected_b.unbind(0), bad))

    @property
    def gates(self) -> bool:
        """Whether `track` and `track_together` heed `good`, or there is nothing to track."""
        return not self.TRACKS

    def track_together(
        self,
        params: Sequence[ProjectedParam],
        projected_b: Tensor,
        good_b: Tensor | None = None,
    ) -> None:
        """`track` of B matrices of one geometry, for GPUs.

        Args:
            params: the matrices.
            projected_b: their projected gradients, not read afterwards.
            good_b: flags on the device: other gradients count as zero; only given if it `gates`.
        """
        if self.TRACKS:
            for param, projected in zip(params, projected_b.unbind(0), strict=True):
                self.track(param, projected)
                param.read = None

    def track(self, param: ProjectedParam, projected: Tensor) -> None:  # noqa: B027 (optional)
        """Called after the write-back; an online projector updates its bases here."""
