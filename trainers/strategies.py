"""Building a run's model and optimizer for its number of processes and its strategy."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import lowrank.optimizers as optimizers
from lowrank.optimizers import InBackward, accepts, build
from lowrank.optimizers.engine.method import TABLE

from .config import RunConfig
from .distributed import World
from .in_backward import begin
from .models import LanguageModel, build_model
from .parts import load_initial
from .sharding import build_sharded
from .zero_engine import ZeroEngine, import_deepspeed

#: The strategy of a process by itself, whatever is set.
ALONE = "alone"


@dataclass(frozen=True)
class Training:
    """What is trained, and how.

    Attributes:
        model: the model itself.
        module: what training calls: the model, or `DistributedDataParallel` or DeepSpeed's engine
            around it.
        optimizer: of the model's parameters.
        engine: under "deepspeed".
        handle: of updates in the backward pass, if they are on.
    """

    model: LanguageModel
    module: nn.Module
    optimizer: torch.optim.Optimizer
    engine: ZeroEngine | None = None
    handle: InBackward | None = None


def strategy_of(config: RunConfig, size: int) -> str:
    """The strategy that a run of so many processes has: "alone", "ddp", "fsdp2" or "deepspeed".

    Raises:
        ValueError: the optimizer, `train.update_in_backward` or `model.compile` doesn't go with
            the strategy.
    """
    asked, name = config.distributed.strategy, config.optimizer.name
    if size == 1:
        return ALONE
    if config.train.update_in_backward and asked != "fsdp2":
        raise ValueError(
            f"train.update_in_backward is True with distributed.strategy={asked!r} on {size}"
            " processes, which averages gradients after they were used; accepted: false, or"
            " distributed.strategy=fsdp2"
        )
    if asked not in ("fsdp2", "deepspeed"):
        return "ddp"
    changes = name in TABLE and TABLE[name].conversion is not None
    if changes and config.optimizer.options.get("weight_bits", 8) is not None:
        raise ValueError(
            f"distributed.strategy={asked!r} with optimizer.name={name!r}, which changes the"
            " model's layers; accepted: ddp, or an optimizer that leaves the layers as they are"
        )
    if asked == "deepspeed" and config.distributed.zero_stage == 3 and config.model.compile:
        raise ValueError(
            "model.compile is True with distributed.zero_stage=3, whose hooks have the model"
            " compiled again and again; accepted: false, or distributed.zero_stage=1 or 2"
        )
    return asked


def build_training(config: RunConfig, world: World) -> Training:
    """The model with its first weights, and its optimizer; every process must call it.

    Raises:
        ValueError: a setting is wrong, or doesn't go with the strategy.
        MissingExtraError: DeepSpeed is asked for and not installed.
    """
    strategy = strategy_of(config, world.size)
    if strategy == "deepspeed":
        import_deepspeed(world.device)  # a missing one is told before anything is built
    length, seed = config.data.sequence_length, config.train.seed
    if strategy == "fsdp2":
        model = build_sharded(config.model, length, seed, world)
    else:
        model = build_model(config.model, length, seed, world.device)
    if config.model.initial:
        load_initial(model.network, Path(config.model.initial))
    optimizer = build_optimizer(config, model)
    if strategy == "deepspeed":
        engine = ZeroEngine(config, model, optimizer, world)
        return Training(model, engine.module, optimizer, engine)
    if strategy != "ddp":
        handle = begin(optimizer, config.train) if config.train.update_in_backward else None
        return Training(model, model, optimizer, handle=handle)
    optimizer.share_refreshes()
    module = replicate(model, world)
    if config.distributed.low_rank_gradients:
        _exchange_low_rank(module, optimizer)
    return Training(model, module, optimizer)


def build_optimizer(config: RunConfig, model: LanguageModel) -> Any:
    """The run's optimizer."""
    options = dict(config.optimizer.options)
    if accepts(config.optimizer.name, "total_steps"):
        options.setdefault("total_steps", config.train.steps)
    return build(config.optimizer.name, model.network, lr=config.optimizer.lr, **options)


def replicate(model: nn.Module, world: World) -> nn.Module:
    """The model as training calls it: inside `DistributedDataParallel` when there are several."""
    if world.size == 1:
        return model
    devices = [world.device] if world.device.type == "cuda" else None
    with warnings.catch_warnings():
        # Newer versions have another name for the switch, which still broadcasts at the start.
        warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
        return DistributedDataParallel(
            model, device_ids=devices, gradient_as_bucket_view=True, broadcast_buffers=False
        )


def _exchange_low_rank(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    register = getattr(optimizers, "register_low_rank_hook", None)
    if register is None:
        raise ValueError(
            "distributed.low_rank_gradients is True, but this version of lowrank.optimizers has no"
            " register_low_rank_hook; accepted: false"
        )
    register(module, optimizer)
