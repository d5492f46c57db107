"""Update rules: frozen dataclasses of hyper-parameters with pure functions on tensor lists."""

from .adafactor import Adafactor
from .adafactor8bit import Adafactor8bit
from .adam import Adam
from .adam8bit import Adam8bit
from .base import MOMENT_TRANSPORTS, Update, UpdateRule
from .cautious import CautiousFactored
from .factored_moments import FactoredAdam
from .folded import FoldedAdam
from .lion import Lion
from .momentum import Momentum
from .muon import Muon
from .normalised import NormalisedSGD
from .resting import Resting
from .row_column import RowColumnScaled
from .vector_adam import VectorAdam

__all__ = [
    "MOMENT_TRANSPORTS",
    "Adafactor",
    "Adafactor8bit",
    "Adam",
    "Adam8bit",
    "CautiousFactored",
    "FactoredAdam",
    "FoldedAdam",
    "Lion",
    "Momentum",
    "Muon",
    "NormalisedSGD",
    "Resting",
    "RowColumnScaled",
    "Update",
    "UpdateRule",
    "VectorAdam",
]
