"""Seeds of all random numbers of a step.

Each is a function of the user's seed, the parameter's name, a count (steps, refreshes) and the
purpose. So a parameter's random numbers don't depend on which other parameters there are, nor on
the process or the device, and are the same in a resumed run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lowrank.cuda.noise import mix, random_bits, step_seeds

#: Attributes that hold the wrapped module: torch.compile, FSDP1, activation checkpointing.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
#: Names that `parameters.name_alike` generates for parameters without one.
_PLACE = re.compile(r"group\d+\.\d+_*")


@lru_cache(maxsize=1 << 16)
def unwrapped_name(name: str) -> str:
    """A parameter's name without the prefixes of wrappers and of DDP ("module.")."""
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    while len(parts) > 1 and parts[0] == "module":
        del parts[0]
    return ".".join(parts)


def seed_names(groups: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """For each parameter of each group the name that seeds its random numbers.

    It is the recorded name without wrappers, or the position in the optimizer ("param.12") if none
    is recorded. A repeated name (two models in one optimizer) gets a number ("a#2"), so that no two
    parameters share their random numbers.
    """
    made: list[list[str]] = []
    seen: dict[str, int] = {}
    position = 0
    for group in groups:
        recorded = group.get("param_names") or [""] * len(group["params"])
        own = []
        for name in recorded:
            unnamed = not name or _PLACE.fullmatch(name)
            called = f"param.{position}" if unnamed else unwrapped_name(name)
            seen[called] = seen.get(called, 0) + 1
            own.append(called if seen[called] == 1 else f"{called}#{seen[called]}")
            position += 1
        made.append(own)
    return made


def draw_seed(seed: int, name: str, count: int, use: str) -> int:
    """The 64-bit seed of one random draw.

    Args:
        seed: the user's.
        name: the parameter's name, see `seed_names`.
        count: steps done, or another number that differs between draws.
        use: the purpose ("basis", "rounding").
    """
    return mix(seed, name, count, use)


def draw_seeds(seed: int, names: Sequence[str], counts: Sequence[Tensor], use: str) -> Tensor:
    """`draw_seed` of several draws whose counts only a device knows: the same seeds.

    Args:
        seed: the user's.
        names: of the parameters.
        counts: 0-d and floating, one a name, on one device.
        use: the purpose.

    Returns:
        Signed int64, one a name.
    """
    return step_seeds([mix(seed, name) for name in names], counts, use)


def choose(count: int, size: int, seed: int, device: torch.device) -> Tensor:
    """Draws `count` distinct integers of 0, ..., size - 1 uniformly, the same on every device.

    Returns:
        int64, ascending.
    """
    bits = random_bits(size, seed, device=device).long()
    # The positions in the lower bits break ties.
    keys = bits.bitwise_left_shift_(32).bitwise_or_(torch.arange(size, device=device))
    smallest = keys.topk(count, largest=False, sorted=False).values
    chosen: Tensor = smallest.bitwise_and_((1 << 32) - 1).sort().values
    return chosen
