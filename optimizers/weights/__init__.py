"""Weights: storage in 8 bits, and updates with stochastic rounding."""

from .fused import fused_rows
from .int8 import Int8Weight
from .rows import editable_rows, rounding_seed
from .state import dense_state_dict
from .whole import apply_rule

__all__ = [
    "Int8Weight",
    "apply_rule",
    "dense_state_dict",
    "editable_rows",
    "fused_rows",
    "rounding_seed",
]
