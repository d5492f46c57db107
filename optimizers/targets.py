"""Which parameters of a model are matrices of hidden layers, and which of them patterns select."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from .engine.experts import DIMENSIONS, SMALLEST_SIDE
from .engine.parameters import whole_shape

#: What `patterns` accepts; None is every matrix of the hidden layers.
Patterns = str | Sequence[str] | None

#: Every linear layer, heads and routers included, as transformers' `optim_target_modules` has it.
ALL_LINEAR = "all-linear"
#: Names of hidden layers outside of a list of blocks.
HIDDEN = (
    *("attn", "attention", "mlp", "experts", "intermediate.dense", "feed_forward", "ffn", "mixer"),
    *("DenseReluDense", "in_proj_weight"),
)
#: Names of the linear layers of a router, where experts lie beside it.
_ROUTERS = ("gate", "router", "gating", "wg")
_HEAD = re.compile(r"(.*_)?heads?|classifier|score|pooler|embed.*|.*_embeddings?")
_SIGNS = re.compile(r"[\\^$*+?{}\[\]|()]")
_NUMBER = re.compile(r"\d+")
#: Matrices of `nn.MultiheadAttention` that it holds itself.
_IN_PROJ = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")

Selector = Callable[[str, torch.Tensor, nn.Module], bool]


def checked(patterns: Patterns) -> tuple[str, ...] | None:
    """Patterns as a tuple; a string is one pattern.

    Raises:
        ValueError: they are neither a string nor a list, or one is not a string, is empty, or is
            no regular expression.
    """
    if patterns is None:
        return None
    if not isinstance(patterns, str | list | tuple | set | frozenset):
        raise ValueError(
            f"patterns={patterns!r}: accepted are a part of layers' names, or a list of such"
        )
    made = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    for pattern in made:
        if not isinstance(pattern, str) or not pattern:
            raise ValueError(f"patterns has {pattern!r}: accepted are parts of names of layers")
        try:
            re.compile(pattern if _SIGNS.search(pattern) else "")
        except re.error as error:
            raise ValueError(
                f"patterns has {pattern!r}, which is no regular expression ({error}): accepted are "
                "parts of names of layers, and regular expressions that match whole names"
            ) from None
    if not made:
        raise ValueError("patterns=(): accepted is at least one, or None for all hidden layers")
    return made


def selector(model: nn.Module, patterns: Patterns) -> Selector:
    """A function of (name, parameter, its module) that says whether the patterns select it.

    Case matters. A pattern is a part of the parameter's name or, if it holds a sign of regular
    expressions other than the dot, must match the layer's or parameter's name as a whole.
    `"all-linear"` is every linear layer. None is every matrix of the hidden layers: of those in
    a list of blocks (`layers.3.attn.q_proj`) or with one of `HIDDEN` in their names, without
    embeddings, heads, norms and routers.

    Raises:
        ValueError: as `checked`.
    """
    named = checked(patterns)
    if named is None:
        hidden = hidden_names(model)
        return lambda name, param, module: name in hidden and holds_matrix(param, module)

    def selects(name: str, param: torch.Tensor, module: nn.Module) -> bool:
        if not holds_matrix(param, module):
            return False
        linear = isinstance(module, nn.Linear) or is_transposed(module)
        return any(
            linear if _is_all_linear(pattern) else _matches(pattern, name) for pattern in named
        )

    return selects


def _is_all_linear(pattern: str) -> bool:
    return pattern.replace("_", "-") == ALL_LINEAR


def _matches(pattern: str, name: str) -> bool:
    if not _SIGNS.search(pattern):
        return pattern in name
    whole = re.compile(pattern)
    return bool(whole.fullmatch(name) or whole.fullmatch(name.rpartition(".")[0]))


def is_transposed(module: nn.Module) -> bool:
    """Whether a module is transformers' `Conv1D`: a linear layer whose weight is n x m."""
    weight = getattr(module, "weight", None)
    return (
        type(module).__name__ == "Conv1D" and weight is not None and len(whole_shape(weight)) == 2
    )


def holds_matrix(param: torch.Tensor, module: nn.Module) -> bool:
    """Whether a parameter is the matrix of a linear layer, or the matrices of experts."""
    if isinstance(module, nn.Linear) or is_transposed(module):
        return param is module.weight
    if isinstance(module, nn.MultiheadAttention):
        return any(param is getattr(module, name) for name in _IN_PROJ)
    return holds_experts(param, module)


def holds_experts(param: torch.Tensor, module: nn.Module) -> bool:
    """Whether a parameter is E x m x n for E experts, as transformers 5 stores them."""
    shape = whole_shape(param)
    if len(shape) != DIMENSIONS or isinstance(module, _ConvNd | nn.Bilinear):
        return False
    return shape[0] > 1 and min(shape[1:]) >= SMALLEST_SIDE


def hidden_names(model: nn.Module) -> set[str]:
    """Names of the matrices of hidden layers: those that `patterns=None` selects."""
    return {name for name, param, module in _blocks(model) if _is_hidden(name, param, module)}


def hidden_entries(model: nn.Module) -> dict[str, int]:
    """Entries of what could be projected, by name: tensors of hidden layers that are no vectors.

    These are `hidden_names` and, in lists of blocks, all others with at least two dimensions,
    such as convolutions, without embeddings and routers.
    """
    return {
        name: whole_shape(param).numel()
        for name, param, module in _blocks(model)
        if _is_hidden(name, param, module)
        or (_in_block(name) and min(_matrix(param)) > 1 and not isinstance(module, nn.Embedding))
    }


def _matrix(param: torch.Tensor) -> tuple[int, ...]:
    """The sides of a tensor as a matrix; (0,) for a vector."""
    shape = whole_shape(param)
    if len(shape) < 2:
        return (0,)
    return shape[0], shape.numel() // max(shape[0], 1)


def _blocks(model: nn.Module) -> Iterator[tuple[str, torch.Tensor, nn.Module]]:
    """Every parameter that is in no router, with its name and module."""
    for prefix, module in model.named_modules():
        if _is_router(model, prefix):
            continue
        for name, param in module.named_parameters(recurse=False):
            yield (f"{prefix}.{name}" if prefix else name), param, module


def block_of(name: str) -> str | None:
    """The element of a list of blocks ("model.layers.3") that holds a parameter, if one does."""
    if not _in_block(name):
        return None
    parts = name.split(".")
    first = next(i for i, part in enumerate(parts) if _NUMBER.fullmatch(part))
    return ".".join(parts[: first + 1])


def _in_block(name: str) -> bool:
    """Whether a parameter's module lies within an element of a list, and not in one of heads."""
    parts = name.split(".")[:-1]
    first = next((i for i, part in enumerate(parts) if _NUMBER.fullmatch(part)), len(parts))
    return first < len(parts) - 1 and not any(_HEAD.fullmatch(part) for part in parts[:first])


def _is_hidden(name: str, param: torch.Tensor, module: nn.Module) -> bool:
    if not holds_matrix(param, module) or min(whole_shape(param)) < 2:
        return False
    parts = name.split(".")[:-1]
    if any(_HEAD.fullmatch(part) for part in parts[-1:]):
        return False
    named = any(part in name for part in HIDDEN)
    if len(whole_shape(param)) == DIMENSIONS:
        return named or "moe" in name
    return named or _in_block(name)


def _is_router(model: nn.Module, name: str) -> bool:
    """Whether a module chooses experts: called a router, or a gate beside experts."""
    parts = name.split(".")
    if "router" in parts or parts[-1].endswith("expert_gate"):
        return True
    if parts[-1] not in _ROUTERS:
        return False
    parent = model.get_submodule(".".join(parts[:-1]))
    return any("expert" in child for child, _ in parent.named_children())
