"""Projectors: which subspace a gradient is projected to."""

from .base import Bases, MatrixKey, ProjectedParam, Projector
from .block_power import BlockPowerProjector
from .coordinate import CoordinateProjector
from .correlation import CorrelationProjector
from .cross_head import CrossHeadProjector
from .dct import DCTProjector
from .decompositions import REFRESH_MODES
from .online import ONLINE_OPTIMIZERS, OnlineProjector
from .random import DISTRIBUTIONS, RandomProjector
from .singular import SingularProjector
from .switched import SwitchedProjector
from .telemetry import RefreshEvent

__all__ = [
    "DISTRIBUTIONS",
    "ONLINE_OPTIMIZERS",
    "REFRESH_MODES",
    "Bases",
    "BlockPowerProjector",
    "CoordinateProjector",
    "CorrelationProjector",
    "CrossHeadProjector",
    "DCTProjector",
    "MatrixKey",
    "OnlineProjector",
    "ProjectedParam",
    "Projector",
    "RandomProjector",
    "RefreshEvent",
    "SingularProjector",
    "SwitchedProjector",
]
