"""Residuals: what becomes of the gradient outside the subspace."""

from .base import Dropped, Residual, Write
from .norm_scaled import NormScaled

__all__ = ["Dropped", "NormScaled", "Residual", "Write"]
