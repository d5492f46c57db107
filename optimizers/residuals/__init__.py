"""Residuals: how the gradient outside the subspace is used."""

from .base import Dropped, Residual, RowEdit, ScaledPart, WeightUpdate
from .norm_scaled import NormScaled
from .scaled_gradient import ScaledGradient
from .sign import SignResidual
from .signed_back import SignedBack

__all__ = [
    "Dropped",
    "NormScaled",
    "Residual",
    "RowEdit",
    "ScaledGradient",
    "ScaledPart",
    "SignResidual",
    "SignedBack",
    "WeightUpdate",
]
