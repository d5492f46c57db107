"""Kernels below the optimizers: block-wise 8-bit quantisation of their state."""

from .blockwise import (
    DEFAULT_BLOCK,
    blockwise_bytes,
    dequantize_blockwise,
    dynamic_map,
    quantize_blockwise,
)

__all__ = [
    "DEFAULT_BLOCK",
    "blockwise_bytes",
    "dequantize_blockwise",
    "dynamic_map",
    "quantize_blockwise",
]
