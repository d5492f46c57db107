"""What a parameter of a language model is: hidden matrix, head, embedding, other matrix, vector."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from .coverage import tell
from .engine.experts import DIMENSIONS
from .param_groups import _parameters, no_match
from .targets import Patterns, is_transposed, selector

Named = list[tuple[str, nn.Parameter]]
#: Modules whose weight is an embedding.
EMBEDDINGS = nn.Embedding, nn.EmbeddingBag


class Roles(NamedTuple):
    """Named parameters of a model by what they are.

    Attributes:
        hidden: weights of `nn.Linear` but the head's, and experts of E x m x n.
        transposed: hidden weights that are stored n x m (`Conv1D`).
        head: the weight that gives the logits, also if it is tied to an embedding.
        embeddings: weights of `nn.Embedding`.
        others: all else with more than one dimension (convolutions).
        vectors: biases, norms.
    """

    hidden: Named
    transposed: Named
    head: Named
    embeddings: Named
    others: Named
    vectors: Named


def head_of(model: nn.Module, patterns: Patterns = None) -> Tensor | None:
    """The weight of a model's head, if one can be told: the last of `heads_of`."""
    found = heads_of(model, patterns)
    return found[-1][1] if found else None


def heads_of(model: nn.Module, patterns: Patterns = None) -> list[tuple[str, Tensor]]:
    """What may be a model's head, in the model's order.

    The weight of `model.get_output_embeddings()` (transformers); without it of each `nn.Linear`
    whose weight `patterns` don't select.
    """
    ask = getattr(model, "get_output_embeddings", None)
    if callable(ask):
        try:
            found = getattr(ask(), "weight", None)
        except NotImplementedError:  # a model without a head
            found = None
        if isinstance(found, Tensor):
            return [("get_output_embeddings()", found)]
    selects = selector(model, patterns)
    return [
        (name, module.weight)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not selects(f"{name}.weight", module.weight, module)
    ]


def roles(model: nn.Module, patterns: Patterns = None) -> Roles:
    """Sorts a model's trained parameters; each appears once, under its first name.

    The logger "lowrank" is told once, at INFO, which head and embeddings were found.

    Args:
        model: the model.
        patterns: those of hidden matrices, as in `param_groups`; None is every linear layer.

    Raises:
        ValueError: `patterns` select no matrix that is trained.
    """
    found = Roles([], [], [], [], [], [])
    head, selects = head_of(model, patterns), selector(model, patterns)
    for name, param, module in _parameters(model):
        if param.dim() < 2:
            kind = found.vectors
        elif param is head:
            kind = found.head
        elif isinstance(module, EMBEDDINGS):
            kind = found.embeddings
        elif patterns is not None and not selects(name, param, module):
            kind = found.others
        elif is_transposed(module):
            kind = found.transposed
        elif isinstance(module, nn.Linear) or (
            param.dim() == DIMENSIONS and selects(name, param, module)
        ):
            kind = found.hidden
        else:
            kind = found.others
        kind.append((name, param))
    if patterns is not None and not (found.hidden or found.transposed):
        raise no_match(model, patterns)
    heads, embeddings = (
        ", ".join(name for name, _ in kind) or "none" for kind in (found.head, found.embeddings)
    )
    count = len(found.hidden) + len(found.transposed)
    tell(f"head: {heads}; embeddings: {embeddings}; {count} hidden matrices")
    return found
