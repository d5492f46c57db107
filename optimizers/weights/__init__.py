"""Weights: how they are stored, and how a step writes into them."""

from .int8 import Int8Weight
from .rows import apply_rule, editable_rows, rounding_seed
from .state import dense_state_dict

__all__ = ["Int8Weight", "apply_rule", "dense_state_dict", "editable_rows", "rounding_seed"]
