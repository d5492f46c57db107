"""Quantisers of 8-bit moments: our own block-wise one, or bitsandbytes'."""

from __future__ import annotations

import importlib
import importlib.util
from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from lowrank.cuda import blockwise

from ..engine import checks

Out = tuple[Tensor, Tensor]


class Quantizer(ABC):
    """Converts between fp32 tensors and (uint8 codes, fp32 absmax per block of 256)."""

    @abstractmethod
    def quantize(self, x: Tensor, signed: bool, out: Out | None = None) -> Out:
        """Codes and scales of `x`, written to `out` if given."""

    @abstractmethod
    def dequantize(self, codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
        """The dequantised fp32 tensor."""


class Native(Quantizer):
    """Our own quantiser, see `lowrank.cuda.blockwise`."""

    def quantize(self, x: Tensor, signed: bool, out: Out | None = None) -> Out:
        """See `Quantizer.quantize`."""
        return blockwise.quantize_blockwise(x, signed, out=out)

    def dequantize(self, codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
        """See `Quantizer.dequantize`."""
        return blockwise.dequantize_blockwise(codes, absmax, signed)


class BitsAndBytes(Quantizer):
    """bitsandbytes' kernels with the same maps and blocks, so states are interchangeable."""

    def __init__(self) -> None:
        """Imports the package.

        Raises:
            ImportError: it is not installed.
        """
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ImportError(
                "quantizer='bitsandbytes' needs that package: pip install \"lowrank-pretrain[bnb]\""
            )
        self._functional: Any = importlib.import_module("bitsandbytes.functional")

    def quantize(self, x: Tensor, signed: bool, out: Out | None = None) -> Out:
        """See `Quantizer.quantize`."""
        codes, state = self._functional.quantize_blockwise(
            x.contiguous(),
            code=blockwise.dynamic_map(signed, x.device),
            blocksize=blockwise.DEFAULT_BLOCK,
        )
        if out is None:
            return codes, state.absmax
        for target, value in zip(out, (codes, state.absmax), strict=True):
            target.copy_(value)
        return out

    def dequantize(self, codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
        """See `Quantizer.dequantize`."""
        dense: Tensor = self._functional.dequantize_blockwise(
            codes,
            absmax=absmax,
            code=blockwise.dynamic_map(signed, codes.device),
            blocksize=blockwise.DEFAULT_BLOCK,
        )
        return dense


NATIVE: Quantizer = Native()
QUANTIZERS: dict[str, type[Quantizer]] = {"native": Native, "bitsandbytes": BitsAndBytes}


def quantizer(name: str) -> Quantizer:
    """The quantizer of that name.

    Raises:
        ValueError: there is none.
        ImportError: its package is not installed.
    """
    checks.choice("quantizer", name, QUANTIZERS)
    return QUANTIZERS[name]()
