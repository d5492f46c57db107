"""Projectors: the subspace of a gradient, when it is refitted and how it is stored."""

from .base import Bases, Projector, Slot
from .coordinate import CoordinateProjector
from .correlation import CorrelationProjector
from .cross_head import CrossHeadProjector
from .decompositions import REFRESH_MODES
from .geometry import PROJ_TYPES, Geometry, RowRange, Side
from .online import ONLINE_OPTIMIZERS, OnlineProjector
from .random import DISTRIBUTIONS, RandomProjector
from .schedule import EveryK, Once, Schedule
from .singular import SingularProjector
from .storage import BasisStorage, DenseBasis
from .telemetry import RefreshEvent

__all__ = [
    "DISTRIBUTIONS",
    "ONLINE_OPTIMIZERS",
    "PROJ_TYPES",
    "REFRESH_MODES",
    "Bases",
    "BasisStorage",
    "CoordinateProjector",
    "CorrelationProjector",
    "CrossHeadProjector",
    "DenseBasis",
    "EveryK",
    "Geometry",
    "Once",
    "OnlineProjector",
    "Projector",
    "RandomProjector",
    "RefreshEvent",
    "RowRange",
    "Schedule",
    "Side",
    "SingularProjector",
    "Slot",
]
