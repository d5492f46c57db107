"""Seeds of a layer's random numbers, from its name rather than its position.

So a layer that is frozen or excluded doesn't change the random numbers of the others.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from lowrank.cuda.noise import mix

from ..engine.seeds import WRAPPERS


def layer_seed(seed: int, name: str, *parts: int) -> int:
    """The 64-bit seed of a layer.

    Args:
        seed: the user's.
        name: the layer's name in its model, without wrappers (`named_layers`).
        *parts: further integers that distinguish draws, such as a step.
    """
    return mix(seed, name, *parts)


def named_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Each module once, under its name without wrappers."""
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
