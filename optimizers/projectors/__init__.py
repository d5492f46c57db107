"""Projectors: the subspace of a gradient, when it is refitted and how it is stored."""

from .base import Projector, Slot
from .decompositions import REFRESH_MODES
from .geometry import PROJ_TYPES, Geometry, RowRange, Side
from .schedule import EveryK
from .singular import SingularProjector
from .storage import BasisStorage, DenseBasis
from .telemetry import RefreshEvent

__all__ = [
    "PROJ_TYPES",
    "REFRESH_MODES",
    "BasisStorage",
    "DenseBasis",
    "EveryK",
    "Geometry",
    "Projector",
    "RefreshEvent",
    "RowRange",
    "Side",
    "SingularProjector",
    "Slot",
]
