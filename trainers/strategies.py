"""Building a run's model and optimizer for its number of processes and its strategy."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import lowrank.optimizers as optimizers
from lowrank.optimizers import InBackward, compress_activations, convert
from lowrank.optimizers.engine.method import TABLE

from .choice import build_named
from .config import RunConfig
from .converted import convert_and_shard, replaces_layers
from .distributed import World
from .in_backward import begin
from .models import LanguageModel, build_model
from .official import is_official
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
    if config.train.update_in_backward and is_official(name):
        raise ValueError(
            f"train.update_in_backward is True with optimizer.name={name!r}; accepted: false for"
            " official packages"
        )
    if size == 1:
        return ALONE
    if is_official(name):
        raise ValueError(
            f"optimizer.name={name!r} on {size} processes; accepted: one process for official"
            " packages"
        )
    if config.train.update_in_backward and asked != "fsdp2":
        raise ValueError(
            f"train.update_in_backward is True with distributed.strategy={asked!r} on {size}"
            " processes, which averages gradients after they were used; accepted: false, or"
            " distributed.strategy=fsdp2"
        )
    if asked not in ("fsdp2", "deepspeed"):
        return "ddp"
    bits = weight_bits(config)
    if bits is not None:
        raise ValueError(
            f"distributed.strategy={asked!r} with optimizer.name={name!r} and weights in {bits}"
            " bits, whose codes can't be divided among processes; accepted: ddp, or"
            " model.weight_bits=16"
        )
    if config.model.compressed_activations:
        raise ValueError(
            f"distributed.strategy={asked!r} with model.compressed_activations="
            f"{config.model.compressed_activations}; accepted: ddp, or 0"
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
    divided = strategy == "fsdp2"
    if divided and not replaces_layers(config):
        model = build_sharded(config.model, length, seed, world)
    else:
        model = build_model(config.model, length, seed, world.device, quantisation(config))
    if divided and replaces_layers(config):
        convert_and_shard(config, model, method_options(config), world)
    optimizer = build_optimizer(config, model)
    if config.model.compressed_activations:
        model.compression = compress_activations(
            model.network,
            config.model.compressed_activations,
            gap=config.model.compression_gap,
            seed=seed,
            patterns=method_options(config).get("patterns"),
        )
    if strategy == "deepspeed":
        engine = ZeroEngine(config, model, optimizer, world)
        return Training(model, engine.module, optimizer, engine)
    if strategy != "ddp":
        handle = None
        if config.train.update_in_backward:
            handle = begin(optimizer, config.train, micro_batches(config, world.size))
        return Training(model, model, optimizer, handle=handle)
    optimizer.share_refreshes()
    module = replicate(model, world)
    if config.distributed.low_rank_gradients:
        _exchange_low_rank(module, optimizer)
    return Training(model, module, optimizer)


def micro_batches(config: RunConfig, size: int) -> int:
    """A process's micro-batches of a step."""
    shards = config.distributed.data_shards or size
    return -(-config.train.accumulation * shards // size)


def method_options(config: RunConfig) -> dict[str, Any]:
    """The options of a run's optimizer, `model.weight_bits` among them.

    Raises:
        ValueError: `model.weight_bits` contradicts the optimizer's option of that name, or the
            method has no quantised weights.
    """
    options, name, asked = dict(config.optimizer.options), config.optimizer.name, "weight_bits"
    bits = config.model.weight_bits
    if bits is None or name not in TABLE:
        return options
    own = None if bits == 16 else bits
    if asked in options and options[asked] != own:
        raise ValueError(
            f"model.weight_bits={bits} and optimizer.weight_bits={options[asked]!r} contradict each"
            " other; accepted: one of the two"
        )
    if asked in TABLE[name].conversion.options:
        options[asked] = own
    elif own is not None:
        raise ValueError(
            f"model.weight_bits={bits} with optimizer.name={name!r}, which replaces the layers;"
            " accepted: 16, or an optimizer that leaves the layers as they are"
        )
    return options


def weight_bits(config: RunConfig) -> int | None:
    """Bits that the run's weights are quantised to; None of dense ones.

    Raises:
        ValueError: as `method_options`.
    """
    name = config.optimizer.name
    if name not in TABLE:
        return None
    found: int | None = method_options(config).get(
        "weight_bits", TABLE[name].conversion.weight_bits
    )
    return found


def quantisation(config: RunConfig) -> Callable[[nn.Module], nn.Module] | None:
    """What quantises the run's weights; None where they are dense."""
    if weight_bits(config) is None:
        return None
    options = {k: v for k, v in method_options(config).items() if v is not None}
    return partial(convert, config.optimizer.name, **options)


def build_optimizer(config: RunConfig, model: LanguageModel) -> Any:
    """The run's optimizer."""
    options = method_options(config)
    name, lr = config.optimizer.name, config.optimizer.lr
    return build_named(name, model.network, lr, options, config.train.steps)


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
