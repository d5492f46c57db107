"""A weight in eight or four bits that a training loop can use as any other parameter.

`QuantizedWeight` is a tensor subclass with an apparent dtype (bf16, fp32), `requires_grad` and an
ordinary dense `.grad`, over codes and scales (`formats`). `F.linear` makes a temporary dense copy
of the layer's weight, which neither forward nor backward keeps; `F.embedding` dequantises the rows
that it needs. Every other operation acts on a dense copy. Only `copy_` and the optimizers of this
package, which round stochastically (`rows.editable_rows`), change it. Any other in-place operation
raises.
"""

from __future__ import annotations

import copy
import sys
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from types import FrameType
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowrank.cuda import groups

from .formats import FORMATS, GROUP_SIZES, Chunk, Format, Parts
from .linear import quantized_embedding, quantized_linear
from .operations import run
from .read_entries import entries_of, is_view, lost_write

#: What `Module.to` and the like call.
_MOVES = (Tensor.to, Tensor.cuda, Tensor.float, Tensor.half, Tensor.bfloat16)
_ENGINE = "deepspeed.runtime.engine"
_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]
#: Methods that read memory which a wrapper doesn't have, and what to call instead.
_NO_MEMORY = {
    Tensor.numpy: "weight.dequantize().numpy()",
    Tensor.__array__: "weight.dequantize().numpy()",
    Tensor.tolist: "weight.dequantize().tolist()",
    Tensor.share_memory_: "sharing weight.parts(), or a model after merge(model)",
    Tensor.is_shared: "a model after merge(model)",
}


class QuantizedWeight(Tensor):
    """Base of `Int8Weight` and `Int4Weight`; see the module.

    Attributes:
        codes: uint8.
        scales: one a group, in the apparent dtype.
        group_size: entries of the flattened matrix that share a scale; the last group may have
            fewer.
    """

    BITS: ClassVar[int]

    codes: Tensor
    scales: Tensor
    group_size: int

    @classmethod
    def of_parts(
        cls,
        parts: Iterable[Tensor],
        shape: Sequence[int],
        group_size: int,
        requires_grad: bool = False,
    ) -> Self:
        """Wraps codes and scales, without copies.

        Raises:
            ValueError: they don't fit together.
        """
        found = list(parts)
        layout = FORMATS[cls.BITS](tuple(shape), group_size)
        layout.check(found)
        made: Self = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=found[1].dtype, device=found[0].device, requires_grad=requires_grad
        )
        for name, part in zip(layout.PARTS, found, strict=True):
            setattr(made, name, part)
        made.group_size = group_size
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing; see `__new__`."""

    @classmethod
    def quantize(cls, dense: Tensor, group_size: int | None = None) -> Self:
        """Rounds a floating-point matrix of any strides to the nearest codes."""
        size = GROUP_SIZES[cls.BITS] if group_size is None else group_size
        layout = FORMATS[cls.BITS](tuple(dense.shape), size)
        return cls.of_parts(layout.encode(dense), dense.shape, size)

    def storage_format(self) -> Format:
        """How the parts are to be read."""
        return FORMATS[self.BITS](tuple(self.shape), self.group_size)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """A dense copy, in the apparent dtype unless another is given; no gradient flows to it."""
        return self.storage_format().dense(self.parts(), dtype or self.scales.dtype)

    def rows_at(self, indices: Tensor) -> Tensor:
        """Rows of the weight, (..., n) for indices of shape (...), in the apparent dtype."""
        return self.storage_format().rows_at(self.parts(), indices, self.scales.dtype)

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes that are stored: codes and what groups of them share."""
        return sum(part.nbytes for part in self.parts())

    def parts(self) -> tuple[Tensor, ...]:
        """Codes, scales and, in eight bits, zero points."""
        return tuple(getattr(self, name) for name in FORMATS[self.BITS].PARTS)

    def assign(self, dense: Tensor, *, nearest: bool = False) -> None:
        """In place: rounds `dense` to codes; groups with equal values are unchanged.

        Groups that move by less than a step on average are rounded stochastically, with torch's
        generator, so that a running average follows; see `formats.Chunk.replace`.

        Args:
            dense: same shape, any floating dtype and device.
            nearest: rounds every group to the nearest codes, as a checkpoint is loaded.
        """
        source = dense.detach().to(self.device).reshape(-1)
        for start, stop, _ in groups.spans(self.numel(), self.group_size, self.device):
            self.entries(start, stop).replace(source[start:stop], self.dtype, nearest=nearest)

    def lerp_towards(self, value: Tensor, rate: float | Tensor) -> None:
        """In place: W <- W + rate (value - W), in fp32 at least, rounded as `assign` does.

        Args:
            value: same shape, quantised or dense.
            rate: a number, or a tensor of one entry.
        """
        wide = torch.promote_types(self.dtype, torch.float32)
        if isinstance(value, QuantizedWeight):
            value = value.dequantize()
        source = value.detach().to(self.device).reshape(-1)
        for start, stop, _ in groups.spans(self.numel(), self.group_size, self.device):
            chunk = self.entries(start, stop)
            moved = chunk.load(wide).lerp_(source[start:stop].to(wide), rate)
            chunk.replace(moved, wide, nearest=False)

    def entries(self, start: int, stop: int) -> Chunk:
        """The flattened entries [start, stop), which must be whole groups."""
        layout = self.storage_format()
        return Chunk(layout, layout.part(self.parts(), start, stop), stop - start)

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        return (
            f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype}, "
            f"device={self.device}, group_size={self.group_size}, "
            f"requires_grad={self.requires_grad})"
        )

    # Copies

    def like(self, parts: Iterable[Tensor]) -> Self:
        """A weight of the same layout, without gradient."""
        return self.of_parts(parts, self.shape, self.group_size)

    def like_parameter(self, parts: Parts) -> Self:
        """A weight of the same layout, that is a parameter and has a gradient if this one does."""
        made = self.of_parts(parts, self.shape, self.group_size, self.requires_grad)
        return nn.Parameter(made, self.requires_grad) if is_parameter(self) else made  # type: ignore[return-value]

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        if id(self) not in memo:
            copied = self.like_parameter([part.clone() for part in self.parts()])
            memo[id(self)] = copied
            copied.grad = copy.deepcopy(self.grad, memo)
        found: Self = memo[id(self)]
        return found

    @abstractmethod
    def __reduce_ex__(self, protocol: object) -> tuple[Callable[..., Self], tuple[Any, ...]]: ...

    def __tensor_flatten__(self) -> tuple[list[str], int]:
        return list(FORMATS[self.BITS].PARTS), self.group_size

    @classmethod
    def __tensor_unflatten__(
        cls, inner: dict[str, Tensor], group_size: int, size: Sequence[int], stride: object
    ) -> Self:
        return cls.of_parts((inner[name] for name in FORMATS[cls.BITS].PARTS), size, group_size)

    # Operations

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.linear:
            named = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
            if isinstance(named["weight"], QuantizedWeight):
                return quantized_linear(named["input"], named["weight"], named.get("bias"))
        if func is functional.embedding:
            names = ("indices", "weight", "padding_idx", "max_norm", "norm_type")
            named = dict(zip((*names, "scale_grad_by_freq", "sparse"), args, strict=False))
            given = {("indices" if k == "input" else k): v for k, v in kwargs.items()}
            return quantized_embedding(**named, **given)
        if func in _MOVES:
            _refuse_engine(args[0])
        if func in _NO_MEMORY:
            raise ValueError(
                f"{func.__name__} of a weight in {cls.BITS} bits, which has no dense memory: "
                f"accepted is {_NO_MEMORY[func]}"
            )
        if func is Tensor.__setitem__:
            raise lost_write(args[0])
        with torch._C.DisableTorchFunctionSubclass():
            if func == _SET_DATA:
                return _set_data(*args)
            made = func(*args, **kwargs)
        return entries_of(made) if is_view(func) else made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Iterable[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return run(QuantizedWeight, func, args, kwargs or {})  # type: ignore[type-abstract]


def _refuse_engine(weight: Any) -> None:
    """Raises `ValueError` if DeepSpeed's engine moves a weight.

    It keeps weak references to parameters, which torch then can't exchange, and broadcasts and
    flattens memory that a quantised weight doesn't have. Nothing of the engine asks before.
    """
    if _ENGINE not in sys.modules or not isinstance(weight, QuantizedWeight):
        return
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == _ENGINE:
            raise ValueError(
                f"deepspeed.initialize with a weight of shape {tuple(weight.shape)} in "
                f"{weight.BITS} bits: accepted are dense weights (weight_bits=None), or "
                "DistributedDataParallel"
            )
        frame = frame.f_back


def is_parameter(tensor: Tensor) -> bool:
    """Whether a tensor is an `nn.Parameter`; of a subclass type checkers deny it."""
    return isinstance(tensor, nn.Parameter)


def _set_data(weight: Tensor, value: Tensor) -> None:
    """Implements `weight.data = value`."""
    if not isinstance(weight, QuantizedWeight):
        weight.data = value.dequantize() if isinstance(value, QuantizedWeight) else value
        return
    same = (value.shape, value.dtype, value.device) == (weight.shape, weight.dtype, weight.device)
    if not same:
        raise ValueError(
            f"data of shape {tuple(value.shape)}, {value.dtype} on {value.device} for an "
            f"INT{weight.BITS} weight of shape {tuple(weight.shape)}, {weight.dtype} on "
            f"{weight.device}: accepted are the same; module.to(...) moves and casts"
        )
    if isinstance(value, type(weight)) and value.group_size == weight.group_size:
        for name, part in zip(weight.storage_format().PARTS, value.parts(), strict=True):
            setattr(weight, name, part)
    else:
        weight.assign(value.dequantize() if isinstance(value, QuantizedWeight) else value)
