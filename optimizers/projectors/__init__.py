"""Projectors: the subspace of a gradient, when it is refitted and how it is stored."""

from .base import Bases, Projector, Slot
from .cross_head import CrossHeadProjector
from .decompositions import REFRESH_MODES
from .geometry import PROJ_TYPES, Geometry, RowRange, Side
from .schedule import EveryK, Schedule
from .singular import SingularProjector
from .storage import BasisStorage, DenseBasis
from .telemetry import RefreshEvent

__all__ = [
    "PROJ_TYPES",
    "REFRESH_MODES",
    "Bases",
    "BasisStorage",
    "CrossHeadProjector",
    "DenseBasis",
    "EveryK",
    "Geometry",
    "Projector",
    "RefreshEvent",
    "RowRange",
    "Schedule",
    "Side",
    "SingularProjector",
    "Slot",
]
