"""What training takes, before anything is allocated: see `plan`, and `measure` for the truth."""

from .cards import CARDS, card_bytes, memory_bytes
from .measure import Measured, measure
from .planner import plan, rank
from .result import Plan

__all__ = [
    "CARDS",
    "Measured",
    "Plan",
    "card_bytes",
    "measure",
    "memory_bytes",
    "plan",
    "rank",
]
