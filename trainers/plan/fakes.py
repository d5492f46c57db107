"""Models of fake tensors with their optimizers, as deep as is needed to plan deeper ones."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lowrank.cuda.library import assuming_libraries
from lowrank.optimizers import LowRankOptimizer, build, state_bytes_by_category
from lowrank.optimizers.engine.devices import as_on_gpu

from ..memory import held_bytes
from ..models import checkpoint_activations
from .deeper import Depths
from .ledger import Ledger
from .network import Blocks, Network, Source, find_blocks, place

#: Blocks of two models that stand for more of them.
DEPTHS = (2, 3)

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


def gradient_size(param: Tensor) -> int:
    """Bytes of a parameter's gradient, which is dense where the parameter is quantised."""
    return param.numel() * param.dtype.itemsize


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
            gradients=sum(map(gradient_size, trained)),
            weights=held_bytes(self.model),
        )
        sizes.update(state_bytes_by_category(self.optimizer))
        return sizes


def made(
    whole: Network,
    source: Source,
    optimizer: str,
    options: Mapping[str, Any],
    device: str,
    depth: int,
) -> Fake:
    """A model with its first blocks only; call it under `faking`.

    Args:
        whole: the model on the meta device, which stays as it is.
        source: what it was made from.
        optimizer: as for `plan`.
        options: of `build`.
        device: of the fake tensors.
        depth: number of blocks.

    Raises:
        ValueError: as `build`, or the model has no blocks.
    """
    model = _copied(whole, blocks_of(whole, source), depth)
    place(model, torch.device(device))
    if source.checkpointing:
        checkpoint_activations(model.network)
    # A ledger answers what is read back; layers are converted in the larger pieces of a GPU.
    with torch.random.fork_rng(devices=[]), Ledger(), as_on_gpu():
        trained = build(optimizer, model.network, **options)
    return Fake(model, blocks_of(model, source), trained)


def _copied(whole: Network, blocks: Blocks, depth: int) -> Network:
    """The modules with the first blocks, their tensors shared."""
    tensors = {id(tensor): tensor for tensor in (*whole.parameters(), *whole.buffers())}
    with blocks.first(depth):
        return copy.deepcopy(whole, tensors)


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


def grown(small: Sizes, large: Sizes, depths: Depths) -> Sizes:
    """Sizes at a depth, from those of two others."""
    return Counter({name: depths.line(small[name], large[name]) for name in large})
