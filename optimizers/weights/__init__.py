"""Weights: storage in eight and four bits, and updates with stochastic rounding."""

from .fused import fused_rows
from .int4 import Int4Weight
from .int8 import Int8Weight
from .quantized import QuantizedWeight
from .rows import editable_rows, rounding_seed, rounding_seeds, rounds
from .state import dense_state_dict
from .whole import apply_rule

__all__ = [
    "Int4Weight",
    "Int8Weight",
    "QuantizedWeight",
    "apply_rule",
    "dense_state_dict",
    "editable_rows",
    "fused_rows",
    "rounding_seed",
    "rounding_seeds",
    "rounds",
]
