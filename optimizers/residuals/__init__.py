"""Residuals: how the gradient outside the subspace is used."""

from .base import Dropped, Residual, RowEdit, ScaledPart, WeightUpdate
from .column_scaled import ColumnScaled
from .error_feedback import ErrorFeedback
from .norm_scaled import NormScaled
from .row_normalised import RowNormalised
from .scaled_gradient import ScaledGradient
from .sign import SignResidual
from .signed_back import SignedBack
from .weight_normalised import WeightNormalised

__all__ = [
    "ColumnScaled",
    "Dropped",
    "ErrorFeedback",
    "NormScaled",
    "Residual",
    "RowEdit",
    "RowNormalised",
    "ScaledGradient",
    "ScaledPart",
    "SignResidual",
    "SignedBack",
    "WeightNormalised",
    "WeightUpdate",
]
