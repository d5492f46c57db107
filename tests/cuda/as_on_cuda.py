"""Runs plain torch on a CPU as CUDA devices may, for references that must have the same bits there.

In the mode `AsOnCuda`:

- an operation that isn't listed fails, because its last bit depends on the device (logarithms,
  sums, interpolation, whatever a compiler contracts into fused multiply-adds);
- a division by a number is a multiplication by its reciprocal, as in torch's CUDA kernels;
- largest and smallest entries that are zero have the sign that a CPU doesn't give them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

#: Exact, or rounded once to the nearest number, on every device.
_SAME = {
    *("add", "sub", "rsub", "mul", "reciprocal", "neg", "abs", "round", "floor", "where"),
    *("sign", "logical_and", "logical_or", "constant_pad_nd"),
    *("eq", "ne", "lt", "le", "gt", "ge", "isfinite", "isnan", "isinf", "any", "bucketize"),
    *("bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_left_shift", "bitwise_right_shift"),
    *("promote_types", "result_type", "empty", "empty_like", "zeros", "zeros_like", "ones"),
    *("arange", "copy", "_to_copy", "_foreach_copy", "clone"),
    *("full", "full_like", "empty_strided", "scalar_tensor", "lift_fresh", "fill", "zero"),
    *("view", "_unsafe_view", "slice", "select", "unsqueeze", "expand", "t", "transpose"),
    *("permute", "unbind", "stack", "cat", "index", "index_select", "detach", "alias", "split"),
    *("_reshape_alias", "as_strided", "__rshift__", "__lshift__", "__and__", "__ior__", "__iand__"),
}
_EXTREMES = {"amax", "amin", "clamp", "clamp_min", "clamp_max", "maximum", "minimum"}


class AsOnCuda(TorchDispatchMode):
    """See the module."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: object,
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Runs one operation."""
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        base = name if name.startswith("__") else name.rstrip("_")
        if base == "div" and _is_number(args[1]):
            return _times(args[0], 1 / torch.tensor(args[1], dtype=args[0].dtype), name, kwargs)
        result = func(*args, **kwargs)
        if base in _EXTREMES:
            written = kwargs.get("out", args[0] if name.endswith("_") else result)
            written.add_(0.0)  # -0 becomes 0
            return result
        double = base == "sqrt" and args[0].dtype == torch.float64  # see normal.normals
        counted = base == "sum" and args[0].dtype == torch.bool
        contracted = kwargs.get("alpha", 1) not in (1, -1)  # a + alpha b with one rounding
        if contracted or (base not in _SAME and base != "div" and not (double or counted)):
            raise AssertionError(f"{func} need not have the same bits on every device")
        return result


def _is_number(value: object) -> bool:
    return not isinstance(value, Tensor) or value.dim() == 0


def _times(x: Tensor, factor: Tensor, name: str, kwargs: dict[str, Any]) -> Tensor:
    if name.endswith("_"):
        return x.mul_(factor)
    return torch.mul(x, factor, **kwargs)
