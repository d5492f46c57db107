"""`lowrank pretrain`: from settings to a finished run's folder."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from .agreement import (
    check_partitions,
    check_processes,
    check_same_data,
    check_same_request,
    check_shared,
)
from .checkpoint import CheckpointStore
from .config import RunConfig
from .config_io import Layer, from_mapping, merge, read_layer, write_config
from .data import Tokenizer, TrainingShare, ValidationSet, build_tokenizer
from .distributed import World, join
from .initial_config import warn_of_tokenizer
from .loop import Loop
from .metrics import cut_after
from .models import parameter_count
from .official import canonical_name
from .parts import Parts, read_parts, saved_config, saved_data_shards
from .preset import canonical, preset_layer, with_cycle
from .recorder import Recorder
from .report import write_report
from .resume import check_unchanged, resumed_config
from .run_folder import Place, absolute, find_place, hold, resolved, store_of
from .state import TrainState, seed_everything
from .strategies import ALONE, build_training, strategy_of
from .strategies import replicate as replicate
from .summary import device_name, summarise, write_summary
from .table import summary_table
from .termination import catch_termination


@dataclass(frozen=True)
class Request:
    """The user's request.

    Attributes:
        settings: what was given explicitly (configuration file, flags, ``--set``), already layered.
        output: the run's folder, None for the default below ``runs``.
        resume: None, "auto", or a folder.
        report: whether report.html is written at the end.
    """

    settings: Layer = field(default_factory=dict)
    output: Path | None = None
    resume: str | None = None
    report: bool = True


def resolve(settings: Layer) -> RunConfig:
    """Layers explicit settings over the presets of their model and optimizer, over the defaults.

    Raises:
        ValueError: a key, a value, the model or the optimizer is unknown.
    """
    default = RunConfig()
    model = _named(settings, "model", default.model.name)
    # raises with the nearest name before anything is made
    optimizer = canonical_name(_named(settings, "optimizer", default.optimizer.name))
    settings = merge(settings, {"optimizer": {"name": optimizer}})
    preset = canonical(preset_layer(model, optimizer), optimizer)
    return from_mapping(with_cycle(preset, canonical(settings, optimizer)))


def pretrain(request: Request, console: Console) -> Path:
    """Trains, evaluates, and writes the run's folder.

    Args:
        request: what to train and where.
        console: shows progress and the final table.

    Returns:
        The run's folder.

    Raises:
        ValueError: something in the request is wrong, or doesn't fit the run to resume.
        Terminated: SIGTERM came; the run is saved.
        TrainingError: the run cannot go on.
        LostProcessError: another process has ended or no longer answers.
    """
    device, timeout = _joining(request)
    with join(device, timeout=timeout) as world:
        check_same_request(request.settings, request.resume, world)
        place, config = _locate(request, world, console)
        if config.train.threads:
            torch.set_num_threads(config.train.threads)
        with hold(place.folder, place.made) if world.leads else nullcontext():
            shrinks = _may_shrink(request, place, config)
            _run(config, place, world, console, request.report, shrinks=shrinks)
    return place.folder


def _may_shrink(request: Request, place: Place, config: RunConfig) -> bool:
    """Whether the vocabulary may become the tokenizer's: none was asked for, and none is saved."""
    given = request.settings.get("model")
    asked = isinstance(given, dict) and "vocab_size" in given
    return place.checkpoint is None and not config.model.initial and not asked


def _run(
    config: RunConfig,
    place: Place,
    world: World,
    console: Console,
    report: bool,
    *,
    shrinks: bool,
) -> None:
    folder, started = place.folder, time.perf_counter()
    store = store_of(folder, keep=config.checkpoint.keep, keep_best=config.checkpoint.best)
    with _build(config, world, shrinks=shrinks, resumes=place.checkpoint is not None) as parts:
        unused = config.model.vocab_size - parts.tokenizer.vocabulary_size
        note = _vocabulary_note(config, parts.config, unused)
        config = parts.config
        if place.checkpoint is not None:
            check_shared(place.checkpoint.folder, world)
            read_parts(place.checkpoint.folder, parts)
        if parts.state.step < config.train.steps:
            parts.stream.prefetch()  # data of no use are found before a file is written
        carried = parts.state.wall_seconds
        if world.leads:
            _prepare(folder, config, place, store, console)
            opening = f"{_opening(parts, folder)}{note if place.checkpoint is None else ''}"
            console.print(opening, highlight=False, markup=False, soft_wrap=True)
        world.wait()
        with (
            catch_termination(alone=world.size == 1) as wish,
            Recorder(folder, config, parts.state, leads=world.leads, console=console) as recorder,
        ):
            Loop(parts, recorder, store, wish).run()
        summary = summarise(parts, carried + time.perf_counter() - started)
    if world.leads:
        finish(folder, summary, console, report)


def finish(
    folder: Path, summary: dict[str, Any], console: Console, with_report: bool = True
) -> None:
    """Writes summary.json, unless the finished run has one, and report.html; prints the table."""
    path = folder / "summary.json"
    written = _read_summary(path)
    if written is None:
        write_summary(summary, path)
    else:
        summary = written
    report = write_report(folder) if with_report else None
    console.print(summary_table(summary))
    if report is not None:
        console.print(f"report: {report}", highlight=False, markup=False, soft_wrap=True)


def _read_summary(path: Path) -> dict[str, Any] | None:
    """What a finished run's summary.json holds; None without one, or where it is broken."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _named(settings: Layer, section: str, default: str, key: str = "name") -> str:
    """A text setting, looked up before the whole is checked."""
    content = settings.get(section) or {}
    value = content.get(key, default) if isinstance(content, dict) else default
    if not isinstance(value, str):
        raise ValueError(f"{section}.{key} is {value!r}; accepted: text")
    return value


def _joining(request: Request) -> tuple[str, float]:
    """The device and `distributed.timeout`, which are needed before the settings are resolved.

    As asked for, else those of the run to resume: another device would round differently.
    """
    folders = [request.output] if request.output is not None else []
    if request.resume not in (None, "auto"):
        resumed = Path(request.resume or "")
        folders = [resumed, resolved(resumed).parent.parent]
    saved = [folder / "config.yaml" for folder in folders if (folder / "config.yaml").is_file()]
    layer = read_layer(saved[0]) if request.resume is not None and saved else {}
    asked = _named(request.settings, "train", "", key="device")
    device = asked or _named(layer, "train", "auto", key="device")
    timeout = None
    for item in (layer, request.settings):
        section = item.get("distributed")
        if isinstance(section, dict):
            timeout = section.get("timeout", timeout)
    given = {} if timeout is None else {"timeout": timeout}
    return device, from_mapping({"distributed": given}).distributed.timeout


def _locate(request: Request, world: World, console: Console) -> tuple[Place, RunConfig]:
    """Rank 0 decides folder and settings for all; an error there is every process's error."""
    found: tuple[Place, RunConfig] | ValueError | OSError | None = None
    if world.leads:
        try:
            found = _decide(request, world.size, console)
        except (ValueError, OSError) as error:
            found = error
    found = world.broadcast(found)
    if isinstance(found, ValueError | OSError):
        raise found
    assert found is not None
    return found


def _decide(request: Request, size: int, console: Console) -> tuple[Place, RunConfig]:
    def warn(text: str) -> None:
        console.print(f"warning: {text}", highlight=False, markup=False, soft_wrap=True)

    explicit_folder = request.resume not in (None, "auto")
    # The settings are checked before a folder is made, except where the folder holds them.
    config = None if explicit_folder else resolve(request.settings)
    if config and request.output and _same(request.output, config.data.source):
        raise ValueError(
            f"--output {request.output} is the data's folder, where metrics.jsonl would be read as"
            " data; choose another"
        )
    if config:
        check_processes(config, size)
    name = f"{config.model.name}-{config.optimizer.name}" if config else ""
    place = find_place(name, request.output, request.resume, warn)
    if size > 1:
        # The other processes may have other working folders.
        place = absolute(place)
    saved = place.folder / "config.yaml"
    if place.checkpoint is not None:
        checkpoint = place.checkpoint.folder
        content = read_layer(saved) if saved.is_file() else saved_config(checkpoint)
        known = {"distributed": {"data_shards": saved_data_shards(checkpoint)}}
        content = merge(known, content)
        named = _named(content, "optimizer", RunConfig().optimizer.name)
        config = resumed_config(content, canonical(request.settings, named))
        # Before anything is built: options of another optimizer would fail there with other words.
        check_unchanged(from_mapping(content), config, checkpoint, place.checkpoint.step)
        check_processes(config, size)
        check_partitions(checkpoint, config, size)
        return place, config
    # With a folder to resume there is a checkpoint, so these are the settings resolved above.
    assert config is not None
    shards_before = _begun_data_shards(saved) if place.restarts else 0
    shards = config.distributed.data_shards or shards_before or size
    config = replace(config, distributed=replace(config.distributed, data_shards=shards))
    check_processes(config, size)
    return place, config


def _begun_data_shards(saved: Path) -> int:
    """The data shards of a run that was begun and left nothing to go on from; 0 if unknown."""
    if not saved.is_file():
        return 0
    return from_mapping(
        {"distributed": read_layer(saved).get("distributed")}
    ).distributed.data_shards


def _same(output: Path, source: str) -> bool:
    """Whether a run would be written among its own data."""
    data = Path(source).expanduser()
    return output.is_dir() and data.is_dir() and output.samefile(data)


def _prepare(
    folder: Path, config: RunConfig, place: Place, store: CheckpointStore, console: Console
) -> None:
    """Brings the folder's files to the step that the run starts from."""
    step = place.checkpoint.step if place.checkpoint is not None else -1
    store.remove_leftovers()
    removed = store.remove_after(step)
    if removed:
        console.print(
            f"removed {len(removed)} checkpoint(s) past step {step}, which will be written anew",
            highlight=False,
        )
    cut_after(folder / "metrics.jsonl", step)
    if step < config.train.steps:
        (folder / "summary.json").unlink(missing_ok=True)
    write_config(config, folder / "config.yaml")


@contextmanager
def _build(
    config: RunConfig, world: World, *, shrinks: bool = False, resumes: bool = False
) -> Iterator[Parts]:
    """Everything the run needs, at step 0; ends the data's helper processes at the end.

    With `shrinks` a vocabulary that is larger than the tokenizer's becomes the tokenizer's; what
    `resumes` gets its weights from its own checkpoint.
    """
    tokenizer = _tokenizer(config, world)
    if shrinks and tokenizer.vocabulary_size < config.model.vocab_size:
        model = replace(config.model, vocab_size=tokenizer.vocabulary_size)
        config = replace(config, model=model)
    check_same_data(config, tokenizer, world)
    seed_everything(config.train.seed)
    started = replace(config, model=replace(config.model, initial="")) if resumes else config
    if started.model.initial:
        warn_of_tokenizer(tokenizer, Path(started.model.initial))
    training = build_training(started, world)
    stream = TrainingShare(
        config.data,
        tokenizer,
        batch_size=config.train.batch_size,
        accumulation=config.train.accumulation,
        seed=config.train.seed,
        shards=config.distributed.data_shards,
        rank=world.rank,
        world_size=world.size,
    )
    try:
        yield Parts(
            config=config,
            world=world,
            tokenizer=tokenizer,
            model=training.model,
            module=training.module,
            optimizer=training.optimizer,
            base_rates=[float(group["lr"]) for group in training.optimizer.param_groups],
            stream=stream,
            validation=ValidationSet(
                config.data,
                tokenizer,
                batch_size=config.eval_batch_size,
                tokens=config.eval.tokens,
                rank=world.rank,
                world_size=world.size,
                # Every process reads the whole set, and one of them is enough to tell.
                on_warning=None if world.leads else lambda _: None,
            ),
            counts=torch.zeros(config.model.vocab_size, dtype=torch.int64),
            state=TrainState(),
            engine=training.engine,
            handle=training.handle,
        )
    finally:
        stream.close()


def _tokenizer(config: RunConfig, world: World) -> Tokenizer:
    """Rank 0 first, so that it trains and caches the tokenizer and the others read it."""
    if not world.leads:
        world.wait()
    tokenizer = build_tokenizer(config.data, config.model.vocab_size)
    if world.leads:
        world.wait()
    return tokenizer


def _vocabulary_note(asked: RunConfig, config: RunConfig, unused: int) -> str:
    """A line about rows of the embedding and head that no token has, if there are any."""
    if unused <= 0:
        return ""
    size, kind = config.model.vocab_size, config.data.tokenizer
    if size != asked.model.vocab_size:
        return (
            f"\nvocabulary of {size:,}, all that the tokenizer {kind} has, instead of"
            f" {asked.model.vocab_size:,} (model.vocab_size)"
        )
    return f"\nmodel.vocab_size is {size:,}: the tokenizer {kind} never uses {unused:,} of them"


def _opening(parts: Parts, folder: Path) -> str:
    config, state = parts.config, parts.state
    shards, size = config.distributed.data_shards, parts.world.size
    per_step = config.train.batch_size * config.train.accumulation * shards
    strategy = strategy_of(config, size)
    stage = f", zero_stage {parts.engine.stage}" if parts.engine else ""
    shared = "" if strategy == ALONE else f", {size} processes ({strategy}{stage})"
    if strategy == ALONE and config.distributed.strategy != "auto":
        shared = (
            f", one process, so distributed.strategy={config.distributed.strategy} does nothing"
        )
    if parts.handle is not None:
        whole, among = len(parts.handle.whole()), sum(1 for _ in parts.model.parameters())
        shared += f", updates in the backward pass ({whole} of {among} gradients kept whole)"
    begins = f"resuming at step {state.step} of" if state.step else "training for"
    return (
        f"{config.model.name} ({parameter_count(parts.model) / 1e6:.1f}M parameters) with"
        f" {config.optimizer.name} on {config.data.source}, {device_name(parts.world.device)}"
        f"{shared}\n"
        f"{begins} {config.train.steps:,} steps of {per_step} x"
        f" {config.data.sequence_length} tokens; folder {folder}"
    )
