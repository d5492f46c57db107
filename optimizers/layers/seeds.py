"""Seeds of a layer's random draws, from its name rather than its position.

A layer that is frozen or left out then doesn't change what the others draw.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from lowrank.cuda.noise import mix

from ..engine.seeds import WRAPPERS


def layer_seed(seed: int, name: str, *parts: int) -> int:
    """A 64-bit seed of a layer's own.

    Args:
        seed: the user's.
        name: of the layer in its model, without wrappers (`named_layers`).
        *parts: what else tells draws apart, such as a step.
    """
    return mix(seed, name, *parts)


def named_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Each module once, under the name that it has when nothing is wrapped."""
    modules = dict(model.named_modules())
    for name, module in modules.items():
        parts = name.split(".") if name else []
        kept: list[str] = []
        for depth, part in enumerate(parts):
            owner = modules.get(".".join(parts[:depth]))
            parallel = isinstance(owner, DataParallel | DistributedDataParallel)
            # DeepSpeed's and other engines, too, keep the whole model as `module`.
            wraps = part == "module" and (parallel or not kept)
            if part not in WRAPPERS and not wraps:
                kept.append(part)
        yield ".".join(kept), module
