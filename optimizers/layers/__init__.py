"""Linear layers whose weight is made of trained parts."""

from .base import FactoredLinear
from .low_rank import LowRankLinear
from .switched import SwitchedLinear

__all__ = ["FactoredLinear", "LowRankLinear", "SwitchedLinear"]
