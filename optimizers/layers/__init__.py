"""Linear layers with a factored weight."""

from .base import FactoredLinear
from .low_rank import LowRankLinear
from .quantized_low_rank import QuantizedLowRankLinear
from .sparse_low_rank import SparseLowRankLinear
from .spectral import SpectralLinear
from .switched import SwitchedLinear

__all__ = [
    "FactoredLinear",
    "LowRankLinear",
    "QuantizedLowRankLinear",
    "SparseLowRankLinear",
    "SpectralLinear",
    "SwitchedLinear",
]
