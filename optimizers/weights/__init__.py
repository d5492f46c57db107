"""Weights: how a step writes into them."""

from .rows import editable_rows

__all__ = ["editable_rows"]
