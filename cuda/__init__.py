"""Kernels below the optimizers: quantisation, sketches, fused updates and write-backs.

Importing this package registers the operations `torch.ops.lowrank.*`.
"""

if __name__ == "cuda":
    # Run from the repository's root, torch would import this folder as NVIDIA's `cuda`.
    raise ImportError("this folder is installed as lowrank.cuda")

from . import ops as _ops  # noqa: F401 (registers the operations)
from .blockwise import (
    DEFAULT_BLOCK,
    blockwise_bytes,
    dequantize_blockwise,
    dynamic_map,
    quantize_blockwise,
)
from .library import kernels, set_kernels, status, using_kernels
from .normal import fill_gaussian, gaussian
from .sketch import rademacher

__all__ = [
    "DEFAULT_BLOCK",
    "blockwise_bytes",
    "dequantize_blockwise",
    "dynamic_map",
    "fill_gaussian",
    "gaussian",
    "kernels",
    "quantize_blockwise",
    "rademacher",
    "set_kernels",
    "status",
    "using_kernels",
]
