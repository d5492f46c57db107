"""summary.json: the results of a run, written once, at its end."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowrank.optimizers import expected_state_bytes, state_bytes

from .data import data_fingerprint
from .evaluation import count_targets, unigram_loss
from .files import write_text
from .memory import weight_bytes
from .models import new_network, parameter_count
from .parts import Parts
from .sharding import is_sharded
from .strategies import strategy_of
from .weights import weights_sha256


def summarise(parts: Parts, wall_seconds: float) -> dict[str, Any]:
    """Gathers the summary of a finished run; every process must call it.

    Args:
        parts: after the last step.
        wall_seconds: from the run's start, all processes that carried it on together.
    """
    config, state, world = parts.config, parts.state, parts.world
    if state.first is None or state.last is None:
        raise ValueError("a run without evaluations has no summary")
    trained_v = world.sum(parts.counts)
    validated_v = torch.zeros_like(parts.counts)
    for batch in parts.validation:
        count_targets(validated_v, batch.targets)
    validated_v = world.sum(validated_v)
    network = parts.model.network
    speed = state.tokens / state.train_seconds if state.train_seconds > 0 else 0.0
    # FSDP2 and ZeRO divide the optimizer's state.
    divided = parts.engine is not None or is_sharded(parts.model)
    parts_of_state = world.size if divided else 1
    return {
        "optimizer": config.optimizer.name,
        "model": config.model.name,
        "parameters": parameter_count(network),
        "steps": state.step,
        "tokens": state.tokens,
        "epochs": state.epoch,
        "initial_val_loss": state.first.loss,
        "val_loss": state.last.loss,
        "unigram_val_loss": unigram_loss(trained_v, validated_v),
        "val_perplexity": state.last.perplexity,
        "bits_per_byte": state.last.bits_per_byte,
        "best_val_loss": state.best,
        "best_step": state.best_step,
        "tokens_per_second": speed,
        "wall_seconds": wall_seconds,
        "weight_bytes": weight_bytes(network),
        "optimizer_state_bytes": state_bytes(parts.optimizer),
        "adamw_state_bytes": expected_state_bytes("adamw", _unsharded(parts), parts_of_state),
        "state_processes": parts_of_state,
        "peak_memory_bytes": state.peak_bytes,
        "skipped_steps": state.skipped,
        "skipped": state.skipped_updates,
        "skipped_documents": world.sum_integer(parts.stream.skipped_documents),
        "skipped_validation_documents": parts.validation.skipped_documents,
        "data": data_fingerprint(config.data),
        "seed": config.train.seed,
        "processes": world.size,
        "data_shards": config.distributed.data_shards,
        "strategy": strategy_of(config, world.size),
        "threads": torch.get_num_threads(),
        "device": device_name(world.device),
        "torch_version": torch.__version__,
        "python_version": platform.python_version(),
        "lowrank_version": package_version(),
        "weights_sha256": weights_sha256(network),
    }


def _unsharded(parts: Parts) -> nn.Module:
    """A model of the same shapes and dtypes without sharded parameters."""
    config = parts.config
    if parts.engine is None and not is_sharded(parts.model):
        network: nn.Module = parts.model.network
        return network
    with torch.device("meta"):
        copy = new_network(config.model, config.data.sequence_length, config.train.seed)
    return copy.to(getattr(torch, config.model.dtype))  # type: ignore[no-any-return]


def write_summary(summary: dict[str, Any], path: Path) -> None:
    """Writes summary.json atomically."""
    write_text(path, json.dumps(summary, indent=2) + "\n")


def device_name(device: torch.device) -> str:
    """The device's name: "cpu", or the GPU's model."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return device.type


def package_version() -> str:
    """The installed version of this package, "unknown" when it runs without being installed."""
    try:
        return version("lowrank-pretrain")
    except PackageNotFoundError:
        return "unknown"
