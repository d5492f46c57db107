"""How bases are stored: dense in some precision, or quantised."""

from .base import BasisStorage, DenseBasis
from .quantized import Int4Basis, Int8Basis

__all__ = ["BasisStorage", "DenseBasis", "Int4Basis", "Int8Basis"]
