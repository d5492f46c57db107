"""SCALE: gradients normalised by rows, and momentum for the head alone.

Glentis et al., "A Minimalist Optimizer Design for LLM Pretraining" (arXiv 2506.16659). With W of
m x n as `nn.Linear` stores it (a row for each output):

    hidden matrices   U_ij = G_ij / rms_j(G_ij)            each row has RMS 1, no state
    head              M <- 0.9 M + 0.1 G, the same of M
    embeddings        U_ij = G_ij / rms_i(G_ij)            each column has RMS 1, no state
    vectors, others   AdamW
    W <- (1 - lr wd) W - lr U

Memory: nothing for a hidden matrix or an embedding, m n for the head, 2 entries for each of a norm
or bias.

`build` and `scale_groups` sort a model's parameters. The head is `model.get_output_embeddings()`,
or where a model has no such method the last `nn.Linear` outside attention and MLP; embeddings are
`nn.Embedding`. An embedding that is tied to the head counts as the head: normalised by rows, with
momentum. Linear layers outside attention and MLP are hidden matrices here. Convolutions get AdamW.
`plain_lr` is the rate of all but the hidden matrices.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from ..coverage import warn_of_left_out
from ..engine.keywords import Keyword
from ..engine.method import method
from ..engine.optimizer import LowRankOptimizer
from ..engine.options import Group
from ..engine.rule_families import SCALE
from ..param_groups import plain_rate
from ..roles import Named, roles
from ..targets import Patterns


def scale_groups(
    model: nn.Module,
    *,
    patterns: Patterns = None,
    weight_decay: float | None = None,
    plain_lr: float | torch.Tensor | None = None,
) -> list[Group]:
    """Groups of hidden matrices, head, embeddings, other matrices and vectors (not decayed).

    Args:
        model: the model, see the module for what is taken for its head.
        patterns: which hidden matrices, as in `param_groups`; None is every linear layer.
        weight_decay: of the matrices; the optimizer's own when None.
        plain_lr: learning rate of all but the hidden matrices; the optimizer's own when None.

    Returns:
        Groups; empty ones but the first are left out.

    Raises:
        ValueError: `patterns` select no matrix that is trained.
    """
    found = roles(model, patterns)
    chosen = [name for name, _ in (*found.hidden, *found.transposed)]
    warn_of_left_out(model, chosen, "under SCALE")
    decay = {} if weight_decay is None else {"weight_decay": weight_decay}
    rate = plain_rate(plain_lr)
    hidden, *others = [
        _group(found.hidden, {**decay, "normalise": "rows", "momentum": 0.0}),
        _group(found.transposed, {**decay, "normalise": "columns", "momentum": 0.0}),
        _group(found.head, {**decay, **rate, "normalise": "rows"}),
        _group(found.embeddings, {**decay, **rate, "normalise": "columns", "momentum": 0.0}),
        _group(found.others, {**decay, **rate, "normalise": None}),
        _group(found.vectors, {**rate, "weight_decay": 0.0, "normalise": None}),
    ]
    return [hidden, *(group for group in others if group["params"])]


def hidden_matrices(model: nn.Module, patterns: Patterns) -> list[nn.Parameter]:
    """What SCALE normalises without momentum, but for embeddings."""
    found = roles(model, patterns)
    return [param for _, param in (*found.hidden, *found.transposed)]


def _group(named: Named, options: dict[str, Any]) -> Group:
    return {
        "params": [param for _, param in named],
        "param_names": [name for name, _ in named],
        **options,
    }


@method(
    "scale_sgd",
    paper="2506.16659",
    summary="SCALE: gradients normalised by rows, momentum for the head alone",
    state="0",
    groups=scale_groups,
    hidden=hidden_matrices,
)
class ScaleSGD(LowRankOptimizer):
    """SGD normalised by rows or columns in groups with `normalise`, AdamW in the others.

    Group keys: `normalise` ("rows", "columns", or None for AdamW) and `momentum` (0 for none).
    `scale_groups(model)` makes such groups: see the page of the method for head and embeddings.
    """

    projects: ClassVar[bool] = False
    marked_by: ClassVar[str | None] = "normalise"
    rule = SCALE
    own_keywords = (
        Keyword(
            "normalise",
            None,
            'default of the group key: "rows", "columns" or None, which is AdamW.',
        ),
    )
