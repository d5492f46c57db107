"""Tensors that are made one at a time while a file is written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Self

import torch
from torch import Tensor

from lowrank.optimizers import QuantizedWeight

from .files import WriteError, writing
from .sharding import whole, whole_shape

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Stored:
    """A tensor that a file is to have.

    Attributes:
        shape: of the whole.
        dtype: of its entries.
        value: makes it, on any device; of a sharded network every process must call it.
    """

    shape: torch.Size
    dtype: torch.dtype
    value: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> Self:
        """A network's own tensor, sharded, quantised or neither."""
        return cls(whole_shape(tensor), tensor.dtype, partial(_dense, tensor))

    @property
    def nbytes(self) -> int:
        """Of the whole."""
        return self.shape.numel() * self.dtype.itemsize


def _dense(tensor: Tensor) -> Tensor:
    found = whole(tensor).detach()
    return found.dequantize() if isinstance(found, QuantizedWeight) else found


def write_weights(tensors: Mapping[str, Stored], path: Path | None) -> None:
    """Writes tensors one at a time as a safetensors file; of sharded ones every process calls it.

    Args:
        tensors: by name, in the same order on every process.
        path: the file on the process that writes, None on the others.

    Raises:
        WriteError: the file can't be written. The other processes aren't kept waiting.
    """
    failed: WriteError | None = None
    with ExitStack() as stack:
        stream: BinaryIO | None = None
        try:
            if path is not None:
                with writing(path):
                    stream = stack.enter_context(path.open("wb"))
                    stream.write(_header(tensors))
        except WriteError as error:
            failed = error
        for tensor in tensors.values():
            complete = tensor.value()
            if path is None or stream is None or failed is not None:
                continue
            try:
                with writing(path):
                    flat = complete.cpu().contiguous().reshape(-1)
                    stream.write(flat.view(torch.uint8).numpy().data)
                    stream.flush()
            except WriteError as error:
                failed = error
    if failed is not None:
        raise failed


def _header(tensors: Mapping[str, Stored]) -> bytes:
    """The length and the JSON that a safetensors file begins with."""
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        content[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data are aligned
    return len(text).to_bytes(8, "little") + text
