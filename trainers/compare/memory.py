"""Memory of a method by category, before it is trained, and ranks that take a given memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from lowrank.optimizers import state_bytes_by_category

from ..config import RunConfig
from ..memory import weight_bytes
from ..models import LanguageModel, new_network
from ..official import is_official, method_of
from ..strategies import build_optimizer

#: Of what the trainer measures, as `report` names it.
CATEGORIES = ("weights", "gradients", "moments", "basis", "other_state")


def predicted(config: RunConfig) -> dict[str, int]:
    """Bytes by category of a run, without memory for its tensors.

    The state's sum is `expected_state_bytes`. Official packages make their state in the first step:
    of them weights and gradients alone are known.

    Raises:
        ValueError: the optimizer doesn't accept its options.
    """
    with torch.device("meta"):
        network = new_network(config.model, config.data.sequence_length, config.train.seed)
    network.to(getattr(torch, config.model.dtype))
    optimizer = build_optimizer(config, LanguageModel(network))
    sizes = {
        "weights": weight_bytes(network),
        "gradients": sum(item.nbytes for item in network.parameters() if item.requires_grad),
    }
    if is_official(config.optimizer.name):
        return sizes
    state = state_bytes_by_category(optimizer)
    return {
        **sizes,
        "moments": state["moments"],
        "basis": state["basis"],
        "other_state": state["other"],
    }


def held(config: RunConfig) -> int:
    """Bytes of weights and optimizer state; of an official package those of ours of its method."""
    own = replace(config.optimizer, name=method_of(config.optimizer.name))
    sizes = predicted(replace(config, optimizer=own))
    return sum(size for name, size in sizes.items() if name != "gradients")


def rank_for(config: RunConfig, most: int) -> tuple[int | None, str]:
    """The largest rank with which weights and state take no more than `most` bytes.

    Returns:
        The rank, None to leave the options as they are, and a remark where `most` isn't met.
    """
    whole = held(_at(config, 1))
    if held(_at(config, config.model.hidden_size)) == whole:
        return None, f"takes {whole:,} bytes whatever its rank; the first method {most:,}"
    if whole > most:
        return 1, f"takes {whole:,} bytes at rank 1, more than the {most:,} of the first method"
    low, high = 1, config.model.hidden_size
    while low < high:
        middle = (low + high + 1) // 2
        if held(_at(config, middle)) <= most:
            low = middle
        else:
            high = middle - 1
    return low, ""


def _at(config: RunConfig, rank: int) -> RunConfig:
    options: dict[str, Any] = {**config.optimizer.options, "rank": rank}
    return replace(config, optimizer=replace(config.optimizer, options=options))
