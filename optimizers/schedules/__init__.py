"""When a basis is refitted."""

from .base import EveryK, Once, Schedule
from .lazy import LazyLayerwise

__all__ = ["EveryK", "LazyLayerwise", "Once", "Schedule"]
