"""The operations `torch.ops.lowrank.*`: schemas, checks, fakes and dispatch.

Every operation writes into tensors that it is given and returns nothing. Each has a reference in
plain torch for every device, and on CPUs and GPUs a compiled implementation, with a
fallback to the reference (other types or strides, a missing library, `set_kernels("torch")`).
The references document the arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import (
    adam,
    blockwise,
    cautious,
    groups,
    growth,
    int4,
    library,
    native_quantize,
    native_update,
    noise,
    normal,
    sketch,
)
from . import write_back as writing

_LIBRARY: Any = torch.library.Library("lowrank", "DEF")  # type: ignore[no-untyped-call]

_UPDATE = "Tensor? direction, Tensor? grad, Tensor? factors"
_ON_DEVICE = "Tensor? sizes=None, Tensor? device_seed=None"
_SIZES = "float beta1, float beta2, float eps, float size, Tensor? sizes"

Implementation = Callable[..., Any]

#: Name, arguments, reference and compiled implementation of each operation.
OPERATIONS: dict[str, tuple[str, Implementation, Implementation]] = {
    "quantize_blockwise": (
        "Tensor x, Tensor(a!) codes, Tensor(b!) absmax, bool signed, int block",
        blockwise.quantize_flat,
        native_quantize.quantize_blockwise,
    ),
    "dequantize_blockwise": (
        "Tensor codes, Tensor absmax, Tensor(a!) out, bool signed, int block",
        blockwise.dequantize_flat,
        native_quantize.dequantize_blockwise,
    ),
    "quantize_groups": (
        "Tensor x, Tensor(a!) codes, Tensor(b!) scales, Tensor(c!) zeros, int levels, "
        "int group_size, int? seed, int first",
        groups.quantize_flat,
        native_quantize.quantize_groups,
    ),
    "dequantize_groups": (
        "Tensor codes, Tensor scales, Tensor zeros, Tensor(a!) out, int group_size",
        groups.dequantize_flat,
        native_quantize.dequantize_groups,
    ),
    "dequantize_groups_list": (
        "Tensor[] codes, Tensor[] scales, Tensor[] zeros, Tensor(a!)[] outs, int group_size",
        groups.dequantize_list,
        native_quantize.dequantize_groups_list,
    ),
    "quantize_int4": (
        "Tensor x, Tensor(a!) codes, Tensor(b!) scales, Tensor(c!)? zeros, str format, "
        "int group_size",
        int4.quantize_flat,
        native_quantize.quantize_int4,
    ),
    "dequantize_int4": (
        "Tensor codes, Tensor scales, Tensor? zeros, Tensor(a!) out, str format, int group_size",
        int4.dequantize_flat,
        native_quantize.dequantize_int4,
    ),
    "dequantize_int4_list": (
        "Tensor[] codes, Tensor[] scales, Tensor[] zeros, Tensor(a!)[] outs, str format, "
        "int group_size",
        int4.dequantize_list,
        native_quantize.dequantize_int4_list,
    ),
    "rademacher": ("Tensor(a!) out, int seed", sketch.fill_flat, native_quantize.rademacher),
    "gaussian": (
        "Tensor(a!) out, int seed, Tensor? device_seed, int first",
        normal.fill_flat,
        native_quantize.gaussian,
    ),
    "gaussian_list": (
        "Tensor(a!)[] outs, int[] seeds, Tensor[] device_seeds, float scale",
        normal.fill_list,
        native_quantize.gaussian_list,
    ),
    "stochastic_bfloat16": (
        "Tensor x, Tensor(a!) out, int seed, int first, Tensor? device_seed=None",
        noise.stochastic_flat,
        native_quantize.stochastic_bfloat16,
    ),
    "step_seeds": (
        "Tensor[] steps, int[] states, int purpose, Tensor(a!) seeds",
        noise.fill_step_seeds,
        native_quantize.step_seeds,
    ),
    "adam": (
        "Tensor[] grads, Tensor(a!)[] exp_avgs, Tensor(b!)[] exp_avg_sqs, Tensor(c!)[] directions, "
        f"Tensor(d!)[] grad_norms, Tensor(e!)[] direction_norms, int axis, {_SIZES}",
        adam.adam,
        native_update.adam,
    ),
    "adam_weights": (
        "Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
        "float beta1, float beta2, float eps, float size, float decay_factor, float alpha, "
        "Tensor? sizes",
        adam.adam_weights,
        native_update.adam_weights,
    ),
    "adam_8bit": (
        "Tensor[] grads, Tensor(a!)[] exp_avgs, Tensor(b!)[] exp_avg_absmax, "
        "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] exp_avg_sq_absmax, Tensor(e!)[] directions, "
        + _SIZES,
        adam.adam_8bit,
        native_update.adam_8bit,
    ),
    "cautious_rows": (
        "Tensor grad, Tensor(a!) codes, Tensor(b!) scales, Tensor by_row, Tensor by_column, "
        "Tensor(c!) direction, int bits, bool cautious, float share, float eps, float correction, "
        "int seed, int first, int stride",
        cautious.cautious_rows,
        cautious.cautious_rows_compiled,
    ),
    "limit_growth": (
        "Tensor(a!)[] stored, Tensor norms, Tensor? good, Tensor(b!) factors, float limit",
        growth.limit_flat,
        growth.limit_growth,
    ),
    "write_back": (
        f"Tensor(a!) weight, {_UPDATE}, float decay_factor, float alpha, int? seed, int first, "
        f"{_ON_DEVICE}",
        writing.write_back,
        native_update.write_back,
    ),
    "write_back_list": (
        "Tensor(a!)[] weights, Tensor[] grads, Tensor[] factors, float decay_factor",
        writing.write_back_list,
        native_update.write_back_list,
    ),
    "write_back_int8": (
        f"Tensor(a!) codes, Tensor(b!) scales, Tensor(c!) zeros, {_UPDATE}, int group_size, "
        f"float decay_factor, float alpha, int seed, int first, {_ON_DEVICE}",
        writing.write_back_int8,
        native_update.write_back_int8,
    ),
    "write_back_int4": (
        f"Tensor(a!) codes, Tensor(b!) scales, {_UPDATE}, int rows, int columns, int group_size, "
        "float decay_factor, float alpha, int seed, int first, int turn, Tensor? sizes=None, "
        "Tensor? device_turn=None",
        writing.write_back_int4,
        native_update.write_back_int4,
    ),
}


def _dispatched(reference: Implementation, compiled: Implementation) -> Implementation:
    """Tries the compiled implementation first."""

    def run(*arguments: Any) -> None:
        try:
            done = compiled(*arguments)
        except library.UnusableError as error:
            library.give_up(error)
            done = False
        if not done:
            reference(*arguments)

    return run


def _marking(implementation: Implementation, written: list[int]) -> Implementation:
    """Increments the version counters of written tensors, as torch's in-place operations do.

    Autograd doesn't detect the writes of compiled code. Without this, a backward pass that needs
    the old values would silently use the new ones.

    Args:
        implementation: of an operation.
        written: positions of the tensors, or lists of them, that it writes into.
    """

    def run(*arguments: Any) -> None:
        implementation(*arguments)
        tensors: list[torch.Tensor] = []
        for position in written:
            value = arguments[position]
            if value is not None:
                tensors += value if isinstance(value, list | tuple) else [value]
        torch.autograd.graph.increment_version(tensors)

    return run


def _nothing(*arguments: Any) -> None:
    """The fake of every operation: returns nothing; shapes don't change."""


def _register(name: str) -> None:
    arguments, reference, compiled = OPERATIONS[name]
    _LIBRARY.define(f"{name}({arguments}) -> ()")
    schema = getattr(torch.ops.lowrank, name).default._schema
    written = [
        position
        for position, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    _LIBRARY.impl(name, _marking(reference, written), "CompositeExplicitAutograd")
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, _marking(_dispatched(reference, compiled), written), key)
    torch.library.register_fake(f"lowrank::{name}", _marking(_nothing, written), lib=_LIBRARY)


for _name in OPERATIONS:
    _register(_name)
