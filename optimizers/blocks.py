"""The blocks of a model, which methods train in turns, and draws of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .coverage import tell
from .engine.parameters import whole_shape
from .param_groups import _group, _parameters, no_match, plain_rate
from .targets import Patterns, block_of, selector

Named = list[tuple[str, nn.Parameter]]


def blocks_of(model: nn.Module, patterns: Patterns = None) -> tuple[dict[str, Named], Named]:
    """Sorts a model's trained parameters into blocks and all others.

    A block is an element of a list of layers (`model.layers.3`) that holds a matrix of the hidden
    layers, norms and biases included. A hidden matrix outside of such lists is a block with its
    layer's bias. A parameter that is tied to another block's counts to the first.

    Args:
        model: the model.
        patterns: of the matrices that make a block, as in `param_groups`.

    Returns:
        Named parameters by the blocks' names, in the model's order; and those of no block.

    Raises:
        ValueError: no matrix that is trained matches the patterns.
    """
    selects = selector(model, patterns)
    found = list(_parameters(model))
    names = {
        block_of(name) or name.rpartition(".")[0]
        for name, param, module in found
        if selects(name, param, module)
    }
    if not names:
        raise no_match(model, patterns)
    blocks: dict[str, Named] = {}
    others: Named = []
    for name, param, _ in found:
        own = block_of(name) or name.rpartition(".")[0]
        (blocks.setdefault(own, []) if own in names else others).append((name, param))
    tell(f"{len(blocks)} blocks: {', '.join(blocks)}")
    return blocks, others


def block_groups(
    model: nn.Module,
    *,
    patterns: Patterns = None,
    weight_decay: float | None = None,
    plain_lr: float | Tensor | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups of each block of a model, and of all else.

    Groups of blocks have the key `block`, the block's number. Each is split into matrices (decayed)
    and vectors such as biases and norms (not decayed).

    Args:
        model: the model.
        patterns: see `blocks_of`.
        weight_decay: of the matrices; the optimizer's own when None.
        plain_lr: learning rate of what is in no block (embeddings, head, last norm) and of vectors
            in blocks; the optimizer's own when None.

    Raises:
        ValueError: no matrix that is trained matches the patterns.
    """
    blocks, others = blocks_of(model, patterns)
    decay = {} if weight_decay is None else {"weight_decay": weight_decay}
    rate = plain_rate(plain_lr)
    parts: list[tuple[Named, dict[str, Any]]] = [
        (named, {"block": number}) for number, named in enumerate(blocks.values())
    ]
    groups = []
    for named, options in (*parts, (others, rate)):
        matrices = [(name, param) for name, param in named if len(whole_shape(param)) > 1]
        vectors = [(name, param) for name, param in named if len(whole_shape(param)) < 2]
        groups.append(_group(matrices, {**decay, **options}))
        groups.append(_group(vectors, {"weight_decay": 0.0, **rate, **options}))
    return [group for group in groups if group["params"]]


def draw_blocks(
    blocks: Sequence[int], count: int, seed: int, weights: Mapping[int, float] | None = None
) -> set[int]:
    """Draws blocks without replacement.

    Args:
        blocks: their numbers.
        count: how many, at most all.
        seed: equal seeds draw equally on every process and device.
        weights: by block, what its probability is proportional to; None is uniform. Where they
            aren't finite and positive in sum the draw is uniform.
    """
    if count >= len(blocks):
        return set(blocks)
    odds = torch.ones(len(blocks), dtype=torch.float64)
    if weights is not None:
        given = torch.tensor([weights[block] for block in blocks], dtype=torch.float64)
        total = given.sum()
        if bool(total.isfinite() & (total > 0) & (given >= 0).all()):
            # A small uniform part, so that enough blocks have a probability above 0.
            odds = given / total + 1e-12
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.multinomial(odds, count, generator=generator)
    return {blocks[position] for position in drawn.tolist()}
