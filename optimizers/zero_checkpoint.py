"""Checkpoints of a DeepSpeed engine, for another number of processes or another stage of ZeRO."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from .engine.managed import ManagedOptimizer
from .engine.parameters import whole_shape
from .engine.zero import PARTITION
from .engine.zero_state import part_state, part_weights, whole_state, whole_weights

#: Names of the optimizer's state and of the weights in a file, in stages 1 and 2 and in stage 3.
_KEYS = (
    ("base_optimizer_state", "single_partition_of_fp32_groups"),
    ("optimizer_state_dict", "fp32_flat_groups"),
)
_SCALER = ("loss_scaler", "dynamic_loss_scale", "overflow")


def load_zero_checkpoint(
    engine: Any,
    load_dir: str | Path,
    tag: str | None = None,
    *,
    load_lr_scheduler_states: bool = True,
) -> dict[str, Any]:
    """Has a DeepSpeed engine go on from a `save_checkpoint` of another number of processes.

    The stage of ZeRO, 1 to 3, may be another one, too. Weights, buffers, the optimizer's state, the
    engine's counts of steps and its learning rate scheduler are restored. Every process must call
    it, and see all files. As `engine.load_checkpoint`, it unpickles: load trusted files only.

    Args:
        engine: what `deepspeed.initialize` returned for an optimizer of this package.
        load_dir: the folder that `save_checkpoint` was given.
        tag: of the checkpoint; by default the latest.
        load_lr_scheduler_states: False to leave the engine's scheduler, if it has one, as it is.

    Returns:
        What else is in the checkpoint: the client state, and entries of DeepSpeed's own.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the engine's optimizer is another package's, the checkpoint doesn't fit it, has
            not all that the model trains or keeps, or can't be read; or one of engine and
            checkpoint alone has a learning rate scheduler.
    """
    stage = engine.zero_optimization_stage()
    if stage not in (1, 2, 3):
        raise ValueError(
            f"the engine has ZeRO stage {stage}: accepted are 1, 2 and 3, and "
            "engine.load_checkpoint for stage 0"
        )
    inner = engine.optimizer
    optimizer = getattr(inner, "optimizer", None)
    if not isinstance(optimizer, ManagedOptimizer):
        raise ValueError(
            f"the engine's optimizer is {type(optimizer).__name__}: accepted are this package's"
        )
    folder = Path(load_dir)
    folder = folder / (tag or (folder / "latest").read_text().strip())
    saved = _partitions(folder)
    keys = next(keys for keys in _KEYS if keys[0] in saved[0])
    states, flats = [item[keys[0]] for item in saved], [item[keys[1]] for item in saved]
    whole, weight = whole_state(optimizer, states), whole_weights(states, flats)
    models = _models(folder, len(saved))
    scheduler = models[0].get("lr_scheduler") if load_lr_scheduler_states else None
    if load_lr_scheduler_states:
        _check_scheduler(engine.lr_scheduler, scheduler, folder)
    stage3 = stage == 3
    names, flats_now = (
        (_KEYS[1], "fp32_partitioned_groups_flat") if stage3 else (_KEYS[0], _KEYS[0][1])
    )
    own, partitions = part_state(optimizer, whole), optimizer._partitions
    assert partitions is not None
    made = part_weights(partitions, getattr(inner, flats_now), weight)
    kept = {key: saved[0][key] for key in _SCALER if key in saved[0]}
    rest = _untrained(engine.module, partitions.params, models)
    if scheduler is not None:
        _load_scheduler(engine.lr_scheduler, scheduler, folder)
    _load_untrained(rest)
    if stage3:
        inner.checkpoint_event_prologue()
    state = {**inner.state_dict(), **kept, **dict(zip(names, (own, made), strict=True))}
    inner.load_state_dict([state] * partitions.processes.world, load_from_fp32_weights=True)
    if stage3:
        inner.checkpoint_event_epilogue()
    else:
        _load_trained(partitions.params, weight)
    first = models[0]
    for name in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, name, first[name])
    return {key: value for key, value in first.items() if key not in ("module", "optimizer")}


def _load(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=False, mmap=True)
    except FileNotFoundError:
        raise
    except (OSError, RuntimeError, EOFError, UnpicklingError) as error:
        raise ValueError(f"{path} can't be read, it may be half a copy: {error}") from error
    return found


def _partitions(folder: Path) -> list[dict[str, Any]]:
    """What each process has saved of weights and optimizer."""
    pattern = re.compile(r"((?:bf16_)?zero_pp_rank_)0(_mp_rank_00_optim_states\.pt)")
    found = [match for path in folder.glob("*.pt") if (match := pattern.fullmatch(path.name))]
    if len(found) != 1:
        raise FileNotFoundError(
            f"{folder} has {len(found)} files *zero_pp_rank_0_mp_rank_00_optim_states.pt; accepted "
            "is one, of an engine with ZeRO and without model parallelism"
        )
    before, after = found[0].groups()
    first = _load(folder / found[0].string)["optimizer_state_dict"]
    states = [first[key] for key, _ in _KEYS if key in first]
    if not states or PARTITION not in states[0]:
        raise ValueError(
            f"{folder} doesn't say how its states are divided: accepted are checkpoints of this "
            "package's optimizers, by this version or a later one"
        )
    rest = [
        _load(folder / f"{before}{rank}{after}")["optimizer_state_dict"]
        for rank in range(1, states[0][PARTITION]["world"])
    ]
    return [first, *rest]


def _models(folder: Path, world: int) -> list[dict[str, Any]]:
    """The files with the modules: one, or under stage 3 one of each process."""
    path = folder / "mp_rank_00_model_states.pt"
    if path.is_file():
        return [_load(path)]
    return [
        _load(folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt") for rank in range(world)
    ]


@torch.no_grad()
def _load_trained(params: list[Tensor], weight: Callable[[int], Tensor]) -> None:
    for number, param in enumerate(params):
        param.copy_(weight(number).view(param.shape))


def _untrained(
    module: torch.nn.Module, trained: Sequence[Tensor], models: Sequence[Mapping[str, Any]]
) -> list[tuple[Tensor, Tensor]]:
    """Buffers and parameters that the optimizer doesn't have, each with what was saved of it.

    Stage 3 has saved fragments of frozen parameters, and nothing of others.

    Raises:
        ValueError: something isn't in the checkpoint.
    """
    stored: Mapping[str, Any] = models[0]["module"]
    fragments = [model.get("frozen_param_fragments") or {} for model in models]
    known = {id(param) for param in trained}
    found = []
    for name, tensor in module.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor) or id(tensor) in known:
            continue
        shape, value = whole_shape(tensor), stored.get(name)
        if name in fragments[0] and len(models) > 1:
            flat = torch.cat([own[name].reshape(-1) for own in fragments])
            value = flat[: shape.numel()].view(shape)
        if not isinstance(value, Tensor) or value.shape != shape:
            trainable = ", which requires a gradient but is not in the optimizer,"
            raise ValueError(
                f"{name}{trainable if tensor.requires_grad else ''} isn't in the checkpoint with "
                f"shape {tuple(shape)}"
            )
        found.append((tensor, value))
    return found


@torch.no_grad()
def _load_untrained(found: Sequence[tuple[Tensor, Tensor]]) -> None:
    for tensor, value in found:
        if not hasattr(tensor, "ds_id"):
            tensor.copy_(value)
            continue
        from deepspeed import zero

        with zero.GatheredParameters([tensor], modifier_rank=0):
            tensor.data.copy_(value)


def _check_scheduler(scheduler: Any, saved: Any, folder: Path) -> None:
    """Raises `ValueError` if one alone is there: the learning rate would start again, or stay."""
    if (scheduler is None) == (saved is None):
        return
    has, lacks = ("checkpoint", "engine") if scheduler is None else ("engine", "checkpoint")
    raise ValueError(
        f"{folder}: the {has} has a learning rate scheduler and the {lacks} has none: accepted are "
        "both, or load_lr_scheduler_states=False, which leaves the engine's as it is"
    )


def _load_scheduler(scheduler: Any, saved: Any, folder: Path) -> None:
    try:
        scheduler.load_state_dict(saved)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{folder}: the learning rate scheduler's state {saved} is not of "
            f"{type(scheduler).__name__}, the engine's; accepted is one of the same class"
        ) from error
