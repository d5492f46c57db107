"""Several processes: what each holds of a model that FSDP2 divides, and what it sends."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import Shard

from lowrank.optimizers import expected_step_traffic
from lowrank.optimizers.engine.method import TABLE

from ..sharding import shard_placement
from .network import Blocks

STRATEGIES = ("ddp", "fsdp2")


@dataclass(frozen=True)
class Parts:
    """Bytes of a model on the first of the processes under FSDP2.

    Attributes:
        weights: its parts of parameters, and all buffers.
        gradients: of its parts.
        gathered: whole parameters that a pass has at once: those outside of blocks and two blocks,
            the one that computes and the next one.
        reduced: whole gradients that a backward pass has at once: those outside of blocks and a
            block's.
        sent: of the passes of a micro-batch: parameters gathered twice, gradients reduced once.
    """

    weights: int
    gradients: int
    gathered: int
    reduced: int
    sent: int


def quantised_bits(optimizer: str, options: Mapping[str, Any]) -> int | None:
    """Bits of the weights that a method quantises with these options; None where all are dense."""
    bits: int | None = options.get("weight_bits", TABLE[optimizer].conversion.weight_bits)
    return bits


def check_divisible(optimizer: str, options: Mapping[str, Any]) -> None:
    """Raises `ValueError` for weights that FSDP2 can't divide, or in a way that isn't planned."""
    conversion = TABLE[optimizer].conversion
    if conversion.replaces_layers:
        raise ValueError(
            f"strategy='fsdp2' with optimizer={optimizer!r}: planned are methods that don't "
            "replace layers"
        )
    bits = quantised_bits(optimizer, options)
    if bits is not None:
        raise ValueError(
            f"strategy='fsdp2' with weight_bits={bits} of {optimizer!r}: accepted is 16 (None), as "
            "fully_shard refuses quantised weights"
        )


def divided(model: nn.Module, blocks: Blocks, world: int) -> Parts:
    """What the first of `world` processes holds; see `trainers.sharding.shard`."""
    placement = shard_placement(model, world)
    params = list(model.parameters())
    trained = [param for param in params if param.requires_grad]

    def held(several: Iterable[nn.Parameter]) -> int:
        return sum(_part(param, placement(param), world) for param in several)

    inside = {id(param) for block in blocks.items for param in block.parameters()}
    root = [param for param in params if id(param) not in inside]
    largest = max((_bytes(block.parameters()) for block in blocks.items), default=0)
    own = max(
        (_bytes(p for p in block.parameters() if p.requires_grad) for block in blocks.items),
        default=0,
    )
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    return Parts(
        weights=held(params) + buffers,
        gradients=held(trained),
        gathered=_bytes(root) + 2 * largest,
        reduced=_bytes(param for param in root if param.requires_grad) + own,
        sent=2 * held(params) + _bytes(trained),
    )


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _part(param: Tensor, placement: Shard | None, world: int) -> int:
    """Bytes of the largest part of a parameter."""
    if not param.dim() or not param.numel():
        return param.nbytes
    length = param.shape[placement.dim if placement is not None else 0]
    return -(-length // world) * (param.nbytes // length)


def wire_bytes(
    name: str,
    model: nn.Module,
    strategy: str,
    world: int,
    accumulation: int,
    parts: Parts | None,
    options: Mapping[str, Any],
) -> dict[str, int | None]:
    """What a step sends.

    Args:
        name: of the optimizer.
        model: the network, not converted where the method replaces no layers.
        strategy: "ddp" or "fsdp2".
        world: processes.
        accumulation: micro-batches; DDP sends in the last one only.
        parts: under FSDP2.
        options: of `build`.

    Returns:
        "passes": of forward and backward passes, gradients under DDP, parameters and gradients
        under FSDP2; "optimizer": of its step between refreshes, None where no formula is known.
    """
    if strategy == "ddp" or parts is None:
        trained = (p for p in model.parameters() if p.requires_grad)
        return {"passes": _bytes(trained), "optimizer": 0}
    conversion = TABLE[name].conversion
    own = None
    if conversion is None or not conversion.replaces_layers:
        own = expected_step_traffic(name, model, world, **options)
    return {"passes": parts.sent * accumulation, "optimizer": own}
