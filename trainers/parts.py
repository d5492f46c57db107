"""The components of a run, and saving and restoring them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.optimizers import InBackward

from .checkpoint import reading, verify
from .config import RunConfig
from .config_io import from_mapping, to_mapping
from .converted import (
    is_converted,
    read_converted,
    read_untrained,
)
from .data import Tokenizer, TrainingShare, ValidationSet
from .dense_weights import dense_weights, own_tensors
from .distributed import World
from .files import WEIGHTS, WriteError, writing
from .models import LanguageModel
from .resume import advice, check_unchanged
from .sharded_checkpoint import (
    OPTIMIZER,
    check_replicas,
    read_optimizer,
    read_weights,
    without_shards,
    write_shards,
)
from .sharding import is_sharded
from .state import TrainState, random_state, restore_random_state
from .stored import Stored, write_weights
from .tensor_files import opened
from .zero_checkpoint import read_divided, stored_weights
from .zero_engine import ZeroEngine, partition_name

#: Quantised weights and converted layers of a checkpoint, where there are any.
LAYERS = "layers.safetensors"
#: The same file's name in checkpoints of version 0.1.
FORMER_LAYERS = "quantized.safetensors"


@dataclass
class Parts:
    """The components of a run.

    Attributes:
        config: the run's settings.
        world: the process group.
        tokenizer: saved with the weights.
        model: the model itself; evaluation and checkpoints use it.
        module: the module that training calls: the model, sharded or not, or
            `DistributedDataParallel` or DeepSpeed's engine around it.
        optimizer: trains the model's parameters.
        base_rates: peak learning rate of each parameter group.
        stream: this process's micro-batches of each step.
        validation: validation batches of this process.
        counts: (V,) int64: how often this process saw each token number as a training target.
        state: the counters.
        engine: under DeepSpeed.
        handle: of updates in the backward pass, if they are on.
    """

    config: RunConfig
    world: World
    tokenizer: Tokenizer
    model: LanguageModel
    module: nn.Module
    optimizer: torch.optim.Optimizer
    base_rates: list[float]
    stream: TrainingShare
    validation: ValidationSet
    counts: Tensor
    state: TrainState
    engine: ZeroEngine | None = None
    handle: InBackward | None = None


def rank_state(parts: Parts) -> dict[str, Any]:
    """The state of this process: random numbers, positions in the data, counts."""
    return {
        "random": random_state(parts.world.device),
        "streams": parts.stream.state_dict(),
        "counts": parts.counts,
    }


def written_by_all(parts: Parts) -> bool:
    """Whether all processes write a checkpoint together, through `write_shared`."""
    return parts.engine is not None or is_sharded(parts.model)


def write_parts(folder: Path, parts: Parts, ranks: list[dict[str, Any]]) -> None:
    """Writes a checkpoint's files into an empty folder.

    Args:
        folder: the folder.
        parts: of rank 0.
        ranks: `rank_state` of every process. Where `written_by_all`, the others must call
            `write_shared` meanwhile.

    Raises:
        WriteError: a file can't be written.
    """
    if written_by_all(parts):
        parts.world.broadcast(folder)
        write_shared(folder, parts)
        _write_configs(parts.model.network, folder)
    else:
        save_network(parts.model.network, folder)
    with writing(folder / "tokenizer.json"):
        parts.tokenizer.save(folder)
    if parts.engine is None:
        optimizer = parts.optimizer.state_dict()
        if is_sharded(parts.model):
            optimizer, _ = without_shards(optimizer)
        _save(optimizer, folder / OPTIMIZER)
    content = {
        "config": to_mapping(parts.config),
        "state": parts.state.to_dict(),
        "ranks": ranks,
    }
    _save(content, folder / "trainer.pt")


def write_shared(folder: Path, parts: Parts) -> None:
    """Writes what all processes write together of a sharded model and its optimizer.

    Raises:
        WriteError: a file can't be written.
    """
    leads, network = parts.world.leads, parts.model.network
    failed: WriteError | None = None
    try:
        if is_converted(network):
            _write_converted(network, folder, leads=leads)
        else:
            write_weights(dense_weights(network), folder / WEIGHTS if leads else None)
    except WriteError as error:
        failed = error
    if parts.world.broadcast(failed is not None):
        raise failed or WriteError(None, "rank 0 can't write it", str(folder / WEIGHTS))
    if parts.engine is not None:
        parts.engine.save(folder, parts.world)
        return
    state = parts.optimizer.state_dict()
    check_replicas(state, parts.world)
    write_shards(without_shards(state)[1], folder, parts.world)


def _write_converted(network: nn.Module, folder: Path, *, leads: bool) -> None:
    """Writes dense weights and the layers' own tensors; every process must call it.

    Raises:
        WriteError: a file can't be written. The other processes aren't kept waiting.
    """
    failed: WriteError | None = None
    for name, tensors in ((WEIGHTS, dense_weights(network)), (LAYERS, own_tensors(network))):
        try:
            write_weights(tensors, folder / name if leads and failed is None else None)
        except WriteError as error:
            failed = error
    if failed is not None:
        raise failed


def _save(content: object, path: Path) -> None:
    # Through Python's file, whose errors say what went wrong; torch's own writer's don't.
    with writing(path), path.open("wb") as stream:
        torch.save(content, stream)


def save_network(network: Any, folder: Path) -> None:
    """Writes a Hugging Face model's weights and configuration, as ``from_pretrained`` reads them.

    One file whatever the size; `save_pretrained` would split it, and show a bar of its own.
    Quantised weights and converted layers are dense in it, made one at a time, and also saved
    unchanged in another file for resuming.

    Raises:
        WriteError: a file can't be written.
    """
    dense = dense_weights(network)
    own = {k: Stored.of(v) for k, v in network.state_dict().items() if k not in dense}
    write_weights(dense, folder / WEIGHTS)
    if own:
        write_weights(own, folder / LAYERS)
    _write_configs(network, folder)


def _write_configs(network: Any, folder: Path) -> None:
    """Writes the configurations that ``from_pretrained`` reads beside the weights."""
    network.config.architectures = [type(network).__name__]
    with writing(folder / "config.json"):
        network.config.save_pretrained(folder)
    with writing(folder / "generation_config.json"):
        network.generation_config.save_pretrained(folder)


def load_network(network: nn.Module, folder: Path) -> None:
    """Restores the weights that `save_network` wrote, bit by bit.

    Raises:
        RuntimeError: they are not those of this network.
    """
    if is_sharded(network):
        if is_converted(network):
            read_converted(network, folder / WEIGHTS, folder / LAYERS)
        else:
            read_weights(network, folder / WEIGHTS)
        return
    layers = [path for path in (folder / LAYERS, folder / FORMER_LAYERS) if path.is_file()]
    with opened(folder / WEIGHTS, *layers[:1]) as files:
        own = network.state_dict().keys() if layers else files.keys()
        weights = {name: file.get_tensor(name) for name, file in files.items() if name in own}
        network.load_state_dict(weights)


def saved_config(folder: Path) -> dict[str, Any]:
    """The configuration that a checkpoint holds, as `from_mapping` takes it.

    Raises:
        DamagedCheckpointError: the file can't be read.
    """
    return _with_data_shards(*_saved(folder))


def saved_data_shards(folder: Path) -> int:
    """Into how many parts the data of a checkpoint's run are dealt.

    Raises:
        DamagedCheckpointError: the file can't be read.
    """
    found: int = saved_config(folder)["distributed"]["data_shards"]
    return found


def saved_partitions(folder: Path) -> tuple[int, int]:
    """By how many processes a checkpoint was written, and the stage of ZeRO it is divided by or 0.

    Raises:
        DamagedCheckpointError: the file can't be read.
    """
    config, processes = _saved(folder)
    section = config.get("distributed", {})
    divided = processes > 1 and section.get("strategy") == "deepspeed"
    return processes, section.get("zero_stage", 1) if divided else 0


def _saved(folder: Path) -> tuple[dict[str, Any], int]:
    """A checkpoint's configuration, and by how many processes it was written."""
    with reading(folder, "trainer.pt"):
        content = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True)
        return content["config"], len(content["ranks"])


def _with_data_shards(config: dict[str, Any], processes: int) -> dict[str, Any]:
    """A saved configuration; earlier versions dealt the data to the processes without a setting."""
    section = {"data_shards": processes, **config.get("distributed", {})}
    return {**config, "distributed": section}


def read_parts(folder: Path, parts: Parts) -> None:
    """Restores a run from a checkpoint; changes nothing unless the checkpoint is intact.

    Raises:
        DamagedCheckpointError: a file is not as it was written.
        ValueError: the run's settings are not the checkpoint's.
    """
    verify(folder)
    with reading(folder, "trainer.pt"):
        content = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True)
    state = TrainState.from_dict(content["state"])
    ranks = content["ranks"]
    saved = from_mapping(_with_data_shards(content["config"], len(ranks)))
    check_unchanged(saved, parts.config, folder, state.step)
    engine, world = parts.engine, parts.world
    optimizer = _read_optimizer(folder, parts)
    try:
        parts.stream.load_state_dict(_positions(ranks))
    except ValueError as error:
        raise ValueError(f"{error}; {advice(['data'], folder)}") from None
    if engine is None or engine.stage < 3:
        with reading(folder, WEIGHTS):
            load_network(parts.model.network, folder)
    elif is_converted(parts.model.network):
        with reading(folder, WEIGHTS):
            read_untrained(parts.model.network, folder / WEIGHTS, folder / LAYERS)
    if engine is None:
        parts.optimizer.load_state_dict(optimizer)
    else:
        engine.load(optimizer, world)
    own, counts = _own(ranks, world)
    parts.counts.copy_(counts)
    parts.state = state
    restore_random_state(own["random"], parts.world.device)


def _read_optimizer(folder: Path, parts: Parts) -> dict[str, Any]:
    """What the optimizer, or the engine around it, loads; every process must call it."""
    engine, world = parts.engine, parts.world
    processes, stage = saved_partitions(folder)
    if not stage:
        with reading(folder, OPTIMIZER):
            whole = read_optimizer(folder, parts.optimizer)
        if engine is None:
            return whole
        with (
            reading(folder, WEIGHTS),
            stored_weights(parts.model.network, folder / WEIGHTS, folder / LAYERS) as weight,
        ):
            return engine.divide(whole, weight)
    if engine is not None and (processes, stage) == (world.size, engine.stage):
        return engine.read(folder, world)
    with reading(folder, partition_name(0, processes)):
        whole, weight = read_divided(folder, processes, parts.optimizer)
        if engine is None:
            return read_optimizer(folder, parts.optimizer, whole)
        return engine.divide(whole, weight)


def _positions(ranks: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The positions of all streams of the data, by their numbers."""
    if "stream" in ranks[0]:  # of version 0.2 and earlier, where each process had one
        return {number: item["stream"] for number, item in enumerate(ranks)}
    return {number: state for item in ranks for number, state in item["streams"].items()}


def _own(ranks: list[dict[str, Any]], world: World) -> tuple[dict[str, Any], Tensor]:
    """What a process goes on with, and its counts, which are summed over the processes."""
    if len(ranks) == world.size:
        return ranks[world.rank], ranks[world.rank]["counts"]
    total = torch.stack([item["counts"] for item in ranks]).sum(dim=0)
    return ranks[0], total if world.leads else torch.zeros_like(total)
