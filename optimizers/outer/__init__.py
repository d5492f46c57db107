"""Outer optimizers: what processes that train apart exchange, now and then."""

from .sparse_loco import SparseLoCo

__all__ = ["SparseLoCo"]
