"""Models of fake tensors with their optimizers, as deep as is needed to plan deeper ones."""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lowrank.cuda.library import assuming_libraries
from lowrank.optimizers import LowRankOptimizer, build, state_bytes_by_category
from lowrank.optimizers.engine.scratch import SCRATCH_BYTES, Bounded, device_scratch

from ..memory import held_bytes
from ..models import checkpoint_activations
from .ledger import Ledger
from .network import Blocks, Network, Source, find_blocks, new_network, place

#: Blocks that stand for more of them.
DEPTHS = (4, 8)

#: Whole numbers by name, of one depth.
Sizes = Counter[str]


@contextlib.contextmanager
def faking(mode: FakeTensorMode) -> Iterator[None]:
    """Makes fake tensors, for which all kernels are taken to be there."""
    # There may be no GPU to wait for.
    waiting = mock.patch.object(torch.cuda, "synchronize", return_value=None)
    with mode, assuming_libraries(), waiting, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@dataclass(frozen=True)
class Fake:
    """A model as it is trained, of fake tensors.

    Attributes:
        model: the model.
        blocks: its blocks.
        optimizer: trains it.
    """

    model: Network
    blocks: Blocks
    optimizer: LowRankOptimizer

    def sizes(self) -> Sizes:
        """Numbers that grow by the same amount with each of equal blocks."""
        trained = [param for param in self.model.parameters() if param.requires_grad]
        sizes = Counter(
            parameters=sum(param.numel() for param in trained),
            gradients=sum(param.nbytes for param in trained),
            weights=held_bytes(self.model),
        )
        sizes.update(state_bytes_by_category(self.optimizer))
        return sizes


def made(
    source: Source, optimizer: str, options: Mapping[str, Any], device: str, depth: int
) -> Fake:
    """A model with its first blocks only; call it under `faking`.

    Raises:
        ValueError: as `build`, or the model has no blocks.
    """
    model = new_network(source, torch.device("meta"))
    blocks = blocks_of(model, source)
    items = blocks.items[:depth]
    blocks.parent._modules[blocks.name] = nn.ModuleList(items)
    place(model, torch.device(device))
    if source.checkpointing:
        checkpoint_activations(model.network)
    with torch.random.fork_rng(devices=[]), Ledger():  # which answers what is read back
        trained = build(optimizer, model.network, **options)
    return Fake(model, blocks_of(model, source), trained)


def blocks_of(model: Network, source: Source) -> Blocks:
    """The model's blocks.

    Raises:
        ValueError: it has none.
    """
    blocks = find_blocks(model)
    if blocks is None:
        raise ValueError(
            f"model={source.name!r}: {type(model.network).__name__} has no list of blocks"
        )
    return blocks


def grown(small: Sizes, large: Sizes, few: int, depth: int) -> Sizes:
    """Sizes at a depth, from those at `few` blocks and at one more."""
    return Counter(
        {name: small[name] + (large[name] - small[name]) * (depth - few) for name in large}
    )


def depth_of_steps(fake: Fake, depth: int, device: str) -> int | None:
    """Blocks with which an optimizer's scratch in its steps is what it is at a depth.

    It works on lists of matrices together until they reach a bound: twice the bound is as good as
    more. None where all blocks stay below it, so that scratch grows with each of them.

    Args:
        fake: a model with equal blocks.
        depth: of the whole model.
        device: where the steps are planned.
    """
    inside = {id(param) for param in fake.blocks.items[0].parameters()}
    shapes: Counter[Any] = Counter()
    gpu = device == "cuda"
    for group in fake.optimizer.param_groups:
        for param in group["params"]:
            if id(param) in inside:
                kind = param.shape if gpu else None  # those of one shape are worked on together
                shapes[kind] += _entries(tuple(param.shape), group.get("rank")) * 4
    block = max(shapes.values(), default=0)
    bound = device_scratch(torch.device("cuda")) if gpu else SCRATCH_BYTES
    if block * depth <= bound:
        return None
    return min(depth, max(DEPTHS[0], -(-2 * bound // block)))


def batches_grow(seen: Sequence[Bounded], depth: int) -> bool | None:
    """The same of a GPU, from what was split in steps of the larger of `DEPTHS`.

    Single parameters, such as embeddings, are there at any depth.
    """
    many, several = DEPTHS[1], [own for own in seen if own.total > own.largest]
    if all(own.total * depth <= own.bound * many for own in several):
        return True
    return False if all(own.total >= own.bound + own.largest for own in several) else None


def _entries(shape: tuple[int, ...], rank: Any) -> int:
    """Numbers that an update of a parameter works on."""
    if len(shape) == 2 and isinstance(rank, int):
        return min(rank, *shape) * max(shape)
    return int(torch.Size(shape).numel())
