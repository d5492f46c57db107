"""Planning a training run's memory before anything is allocated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lowrank.optimizers import available
from lowrank.optimizers.engine import checks

from ..config import REFITS, RunConfig, TrainConfig
from ..models import network_config
from .cards import card_bytes, memory_bytes
from .estimate import Estimate, Setting
from .network import Source, read_source
from .options import known, method_options, run_options
from .result import Plan, Slack
from .sharded import STRATEGIES

DEVICES = ("cuda", "cpu")
#: Beyond any machine's; products of larger ones overflow torch's sizes.
LARGEST_SIZE = 2**24
#: Most sequences of a micro-batch that are tried.
LARGEST_BATCH = 1 << 20


def plan(
    model: str,
    optimizer: str,
    *,
    memory: str | int | None = None,
    card: str | None = None,
    sequence: int = 2048,
    batch: int = 1,
    accumulation: int = 1,
    world: int = 1,
    strategy: str | None = None,
    device: str = "cuda",
    dtype: str | None = None,
    weight_bits: int | None = None,
    checkpointing: bool | None = None,
    autocast: bool = False,
    update_in_backward: bool = False,
    refit: str = "whole",
    options: Mapping[str, Any] | None = None,
) -> Plan:
    """Plans the memory of a run without allocating it.

    The trainer's and the optimizer's own code runs on tensors without data, for a forward and a
    backward pass of a few blocks, scaled to the model's depth, and three steps of the optimizer,
    with and without refreshes. docs/memory.md says what is counted, and how true it is.

    Args:
        model: a preset's name, or the path of a Hugging Face `config.json` or its folder.
        optimizer: one of `available()`. With a preset its published settings apply.
        memory: what there is, such as "16GB" (10^9 bytes each), "16GiB", or bytes. On a GPU the
            optimizer's scratch is bounded by it (`engine.chunks.device_scratch`); without it by the
            GPU that is there, if there is one.
        card: a card's name instead, such as "4090".
        sequence: tokens of a sequence.
        batch: sequences of a micro-batch on each process.
        accumulation: micro-batches of a step.
        world: processes.
        strategy: "ddp" or "fsdp2"; needed with several processes.
        device: "cuda" or "cpu".
        dtype: "float32" or "bfloat16"; None for the model's own.
        weight_bits: 16 for dense weights, 8 or 4 for quantised ones; None for the method's own.
        checkpointing: recompute each block in the backward pass; None for the preset's choice.
        autocast: products in bfloat16 over float32 weights, as `model.autocast` of the trainer.
        update_in_backward: free gradients as soon as they are used, in the last micro-batch's
            backward pass; what is kept between micro-batches differs by method and step.
        refit: what bases are fitted to then: "whole" or "first", as of
            `lowrank.optimizers.update_in_backward`.
        options: of `build`, such as `rank`.

    Raises:
        ValueError: something is unknown or out of range, or doesn't go together.
        MissingExtraError: `transformers` is not installed.
    """
    setting = asked(
        model,
        optimizer,
        memory=memory,
        card=card,
        sequence=sequence,
        batch=batch,
        accumulation=accumulation,
        world=world,
        strategy=strategy,
        device=device,
        dtype=dtype,
        weight_bits=weight_bits,
        checkpointing=checkpointing,
        autocast=autocast,
        update_in_backward=update_in_backward,
        refit=refit,
        options=options,
    )
    return _planned(model, setting, setting.memory)


def asked(
    model: str,
    optimizer: str,
    *,
    memory: str | int | None = None,
    card: str | None = None,
    sequence: int = 2048,
    batch: int = 1,
    accumulation: int = 1,
    world: int = 1,
    strategy: str | None = None,
    device: str = "cuda",
    dtype: str | None = None,
    weight_bits: int | None = None,
    checkpointing: bool | None = None,
    autocast: bool = False,
    update_in_backward: bool = False,
    refit: str = "whole",
    options: Mapping[str, Any] | None = None,
) -> Setting:
    """What is planned, checked; for arguments and errors see `plan`."""
    available_bytes = _memory(memory, card)
    setting = Setting(
        read_source(model, sequence, dtype, checkpointing, autocast),
        optimizer,
        *(sequence, batch, accumulation, world, strategy, device, update_in_backward, refit),
        method_options(model, optimizer, options or {}, weight_bits),
        available_bytes,
    )
    _check(setting)
    return setting


def rank(model: str, **arguments: Any) -> list[Plan]:
    """Plans every method of `available()`; those that need least memory come first.

    Args:
        model: as for `plan`.
        **arguments: of `plan`, but `optimizer`. Options that a method doesn't have are left out
            for it, if some method has them.

    Raises:
        ValueError: as `plan`, or no method has an option.
    """
    plans = [
        plan(model, name, options=own, **arguments)
        for name, own in options_by_method(arguments.pop("options", None) or {})
    ]
    return sorted(plans, key=lambda made: made.peak)


def options_by_method(options: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Every method of `available()` with those of the options that it has.

    Raises:
        ValueError: no method has an option.
    """
    for option in options:
        if not any(known(name, option) for name in available()):
            raise ValueError(f"option {option!r}: no optimizer has it")
    return [
        (name, {option: value for option, value in options.items() if known(name, option)})
        for name in available()
    ]


def plan_run(config: RunConfig, world: int, device: str) -> Plan:
    """Plans a run as the trainer was asked for it.

    Args:
        config: the run's settings.
        world: processes.
        device: "cuda" or "cpu".

    Raises:
        ValueError: it can't be planned: the strategy is DeepSpeed's, blocks are compiled or keep
            compressed activations, or updates in the backward pass wait for a clipped norm.
    """
    strategy = config.distributed.strategy
    if config.model.compile:
        raise ValueError("model.compile=True: planned are runs without it")
    if config.model.compressed_activations:
        raise ValueError(
            f"model.compressed_activations={config.model.compressed_activations}: planned is 0"
        )
    if world > 1 and strategy == "auto":
        strategy = "ddp"
    model, train, length = config.model, config.train, config.data.sequence_length
    source = Source(
        model.name,
        network_config(model, length),
        getattr(torch, model.dtype),
        model.activation_checkpointing,
        model.autocast,
    )
    setting = Setting(
        source,
        config.optimizer.name,
        *(length, train.batch_size, train.accumulation, world),
        strategy if world > 1 else None,
        device,
        *(_updates_at_once(train), train.refit),
        run_options(config),
    )
    _check(setting)
    return _planned(model.name, setting, None)


def _updates_at_once(train: TrainConfig) -> bool:
    """Whether a run's updates are made in the backward pass.

    Raises:
        ValueError: they wait for a norm, by which some gradients are projected and others whole.
    """
    if not train.update_in_backward or not train.clip or train.clip_norm == "previous":
        return train.update_in_backward
    if train.clip_norm == "exact" and train.accumulation > 1:
        return False  # all gradients are kept whole until step()
    raise ValueError(
        f"train.clip={train.clip:g} and train.clip_norm={train.clip_norm!r} with "
        "train.update_in_backward=true: planned are updates that don't wait for the norm; accepted "
        "are train.clip=0 or train.clip_norm='previous'"
    )


def _memory(memory: str | int | None, card: str | None) -> int | None:
    if memory is not None and card is not None:
        raise ValueError(f"memory={memory!r} with card={card!r}: accepted is one of them")
    if card is not None:
        return card_bytes(card)
    return None if memory is None else memory_bytes(memory)


def _check(setting: Setting) -> None:
    for name in ("sequence", "batch", "accumulation", "world"):
        checks.integer(name, getattr(setting, name), low=1)
        if getattr(setting, name) > LARGEST_SIZE:
            raise ValueError(
                f"{name}={getattr(setting, name)}: accepted are at most {LARGEST_SIZE:,}"
            )
    checks.choice("device", setting.device, DEVICES)
    checks.choice("refit", setting.refit, REFITS)
    if setting.refit == "first" and not setting.update_in_backward:
        raise ValueError("refit='first' without update_in_backward: accepted is 'whole'")
    if setting.strategy is not None:
        checks.choice("strategy", setting.strategy, STRATEGIES)
    if (setting.world > 1) != (setting.strategy is not None):
        raise ValueError(
            f"world={setting.world} with strategy={setting.strategy!r}: accepted are several "
            f"processes with {' or '.join(map(repr, STRATEGIES))}, or one without"
        )
    if setting.update_in_backward and setting.world > 1:
        raise ValueError(
            f"update_in_backward=True with world={setting.world}: planned is one process"
        )
    longest = getattr(setting.source.config, "max_position_embeddings", None)
    if isinstance(longest, int) and setting.sequence > longest:
        raise ValueError(
            f"sequence={setting.sequence}: accepted for {setting.source.name!r} are at most "
            f"{longest} tokens (max_position_embeddings)"
        )


def _planned(model: str, setting: Setting, memory: int | None) -> Plan:
    estimate = Estimate(setting)
    phases = estimate.phases(setting.batch)
    peak = max(sum(parts.values()) for parts in phases.values())
    tokens = setting.batch * setting.accumulation * setting.sequence * setting.world
    return Plan(
        model=model,
        optimizer=setting.optimizer,
        setting=setting.described(),
        parameters=estimate.parameters,
        phases=phases,
        state=estimate.state,
        slack=Slack.of(peak, setting.device),
        memory=memory,
        largest_batch=None if memory is None else _largest_batch(estimate, memory),
        tokens_per_step=tokens,
        wire=estimate.wire,
        notes=estimate.notes,
        between_refits=estimate.between_refits(setting.batch),
    )


def _largest_batch(estimate: Estimate, memory: int) -> int:
    """The most sequences of a micro-batch that surely fit; 0 if not even one does."""

    def room(batch: int) -> int:
        """Bytes that are left; negative where they don't suffice."""
        peak = max(sum(parts.values()) for parts in estimate.phases(batch).values())
        return memory - peak - Slack.of(peak, estimate.setting.device).high

    low, high = 1, 2
    left, lacking = room(low), room(high)
    if left < 0:
        return 0
    while lacking >= 0:
        if high >= LARGEST_BATCH:
            return high
        # Bytes grow in proportion to the batch, once activations make the peak.
        grows = max(1, left - lacking)
        further = high + (high - low) * lacking // grows + 1
        low, left, high = high, lacking, min(further, 64 * high, LARGEST_BATCH)
        lacking = room(high)
    while high - low > 1:
        between = low + (high - low) * left // (left - lacking)
        middle = min(max(between, low + 1), high - 1)
        found = room(middle)
        if found >= 0:
            low, left = middle, found
        else:
            high, lacking = middle, found
    return low
