"""Converted Hugging Face models are saved so that `from_pretrained` gives the same function.

`save_pretrained`, and with it Trainer's checkpoints, would write factors and codes only, in
whose place `from_pretrained` draws weights anew. The files have the dense weights as well, under
their own names: `from_pretrained` and other tools read those, and a converted model that goes on
reads the parts, to the bit.
"""

from __future__ import annotations

import inspect
import types
from typing import Any

from torch import Tensor, nn

from .engine.sharding import is_dtensor
from .layers.base import FactoredLinear
from .weights.quantized import QuantizedWeight
from .weights.state import PARTS


def save_dense_weights(model: nn.Module) -> None:
    """In place: lets `save_pretrained` of a model and of the models inside it add dense weights."""
    for module in model.modules():
        kind = getattr(type(module), "save_pretrained", None)
        if callable(kind) and any(_is_converted(part) for part in module.modules()):
            vars(module)["save_pretrained"] = types.MethodType(save_pretrained, module)


def save_pretrained(self: Any, *args: Any, **options: Any) -> Any:
    """As the class's `save_pretrained`, with the dense weights of converted layers.

    Raises:
        ValueError: a layer is spread over processes.
    """
    original = type(self).save_pretrained
    bound = inspect.signature(original).bind(self, *args, **options)
    if any(_is_converted(module) for module in self.modules()):
        state = bound.arguments.get("state_dict")
        bound.arguments["state_dict"] = with_dense_weights(
            self, self.state_dict() if state is None else state
        )
    return original(*bound.args, **bound.kwargs)


def with_dense_weights(model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """A state dict with the dense weight of each converted layer that it holds, on the CPU.

    Raises:
        ValueError: a layer is spread over processes.
    """
    added: dict[str, Any] = {}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        keys = _part_keys(module, prefix)
        if f"{prefix}weight" in state or not any(key in state for key in keys):
            continue
        params = list(module.parameters(recurse=False))
        if any(is_dtensor(param) or not param.numel() for param in params):
            raise ValueError(
                f"{name} is spread over processes, so that save_pretrained can't make its dense "
                "weight: accepted is merge(model) of a whole model that has loaded this one's "
                "state dict, then save_pretrained"
            )
        added[f"{prefix}weight"] = _dense(module).to("cpu")
    return {**state, **added}


def _is_converted(module: nn.Module) -> bool:
    return isinstance(module, FactoredLinear) or _is_quantised(module)


def _is_quantised(module: nn.Module) -> bool:
    """Whether a layer's weight is quantised; a factored layer's isn't computed for this."""
    layer = isinstance(module, nn.Linear | nn.Embedding)
    return layer and isinstance(module.weight, QuantizedWeight)


def _part_keys(module: nn.Module, prefix: str) -> list[str]:
    if isinstance(module, FactoredLinear):
        return [f"{prefix}{name}" for name in module.FACTORS]
    return [f"{prefix}weight.{part}" for part in PARTS] if _is_quantised(module) else []


def _dense(module: nn.Module) -> Tensor:
    if isinstance(module, FactoredLinear):
        return module.effective_weight().to(module.dtype)
    dense: Tensor = module.weight.detach().dequantize()  # type: ignore[operator]
    return dense
