"""From a comparison's setting to the configurations of its runs."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from ..choice import SEARCHED
from ..config import RunConfig
from ..config_io import from_mapping, merge, to_mapping
from ..files import sha256
from ..initial import initial_weights
from ..official import PACKAGES, is_official
from ..preset import canonical, preset_layer, read_preset
from ..pretrain import resolve
from .entries import Entry
from .setting import Setting

#: What determines nothing of the result.
_FREE = ("log", "checkpoint", "distributed")
_HASH = 12
#: What a search remarks beside the options that it chose.
FOUND = ("val_loss", "tried", "edge", "trials")


@dataclass(frozen=True)
class Run:
    """One run of a comparison.

    Attributes:
        entry: whose it is.
        seed: of weights and data order.
        config: all its settings.
        key: names it: the method, the seed and a hash of all that determines the result.
    """

    entry: Entry
    seed: int
    config: RunConfig
    key: str

    def folder(self, root: Path) -> Path:
        """Where it is kept."""
        return root / "runs" / self.key


def make_run(
    setting: Setting,
    entry: Entry,
    seed: int,
    choice: Mapping[str, Any],
    *,
    steps: int | None = None,
    last: Mapping[str, Any] | None = None,
) -> Run:
    """The run of an entry with a seed.

    Args:
        setting: the comparison.
        entry: the method.
        seed: the seed.
        choice: what tuning has found, or an earlier comparison: optimizer settings. Where there
            are any, the preset's values of the options in `SEARCHED` don't count: what is neither
            chosen nor the setting's nor the entry's is null, the method's own.
        steps: how many, the setting's where None.
        last: optimizer settings above all others.

    Raises:
        ValueError: a setting is not accepted.
    """
    count = setting.steps if steps is None else steps
    every = max(50, min(500, math.ceil(count / 4)))
    given = {
        "optimizer": {"name": entry.optimizer},
        "train": {"steps": count, "seed": seed, "threads": 1},
        "eval": {"every": math.ceil(count / 4)},
        "checkpoint": {"every": every, "keep": 1, "best": False},
        "log": {"progress": False, "optimizer_time": True},
    }
    try:
        layer = merge(
            _common(setting),
            given,
            _left_open(setting, entry) if choice else {},
            canonical(setting.settings, entry.optimizer),
            canonical(_options(choice), entry.optimizer),
            entry.settings,
            {"optimizer": dict(last or {})},
        )
        config = resolve(layer)
        config = replace(config, distributed=replace(config.distributed, data_shards=1))
        return Run(entry, seed, config, _key(setting, entry, seed, config))
    except ValueError as error:
        raise ValueError(f"{entry.label}: {error}") from None


def _common(setting: Setting) -> dict[str, Any]:
    """Sections of the model's preset that hold for all methods, whatever a method's preset says.

    A method's own preset gives its optimizer's options and, for one that restarts the learning
    rate, its schedule.
    """
    preset = read_preset(setting.model)
    sections = ("data", "train", "eval", "model")
    given = {key: preset[key] for key in sections if key in preset}
    whole = to_mapping(from_mapping(given))
    return merge(
        {key: whole[key] for key in sections},
        {"model": {"name": setting.model}, "data": {"source": setting.data}},
    )


def _left_open(setting: Setting, entry: Entry) -> dict[str, Any]:
    """Null for what a search chooses and the preset gives.

    A null stays in the run's config.yaml, so that it is the same run without the comparison.
    """
    preset = canonical(preset_layer(setting.model, entry.optimizer), entry.optimizer)
    return {"optimizer": {key: None for key in SEARCHED if key in preset.get("optimizer", {})}}


def _options(choice: Mapping[str, Any]) -> dict[str, Any]:
    return {"optimizer": {k: v for k, v in choice.items() if k not in FOUND}}


def own_schedule(setting: Setting, run: Run) -> bool:
    """Whether a method's learning rate takes another course than the model's preset has."""
    preset = {"schedule": read_preset(setting.model).get("schedule", {})}
    common = from_mapping(merge(preset, {"schedule": setting.settings.get("schedule", {})}))
    return run.config.schedule != common.schedule


def tokens_per_step(config: RunConfig) -> int:
    """Tokens of one optimizer step, padding included."""
    return config.train.batch_size * config.train.accumulation * config.data.sequence_length


def steps_of(setting: Setting, entry: Entry, first: Entry) -> int:
    """How many steps an entry takes.

    Raises:
        ValueError: a setting is not accepted, or steps of another size can't give the tokens.
    """
    if setting.equal != "tokens" or (not entry.own_steps and not first.own_steps):
        return setting.steps
    wanted = setting.steps * tokens_per_step(make_run(setting, first, 0, {}).config)
    size = tokens_per_step(make_run(setting, entry, 0, {}).config)
    if wanted % size:
        raise ValueError(
            f"{entry.label}: steps of {size} tokens don't make up the {wanted} tokens of"
            f" {first.label}; accepted: a batch that divides them"
        )
    return wanted // size


def _key(setting: Setting, entry: Entry, seed: int, config: RunConfig) -> str:
    content: dict[str, Any] = {
        "config": {k: v for k, v in to_mapping(config).items() if k not in _FREE},
        "data": setting.data_sha256,
        "versions": dict(setting.versions),
    }
    # The places of data and first weights are no part of it: they may be moved.
    content["config"]["data"] = {**content["config"]["data"], "source": ""}
    if config.model.initial:
        path = initial_weights(Path(config.model.initial))
        weights = _weights_sha256(path, path.stat().st_mtime_ns, path.stat().st_size)
        content["config"]["model"] = {**content["config"]["model"], "initial": weights}
    if is_official(entry.optimizer):
        package = PACKAGES[entry.method]
        content["package"] = [package.distribution, package.version]
    text = json.dumps(content, sort_keys=True, default=list)
    digest = hashlib.sha256(text.encode()).hexdigest()[:_HASH]
    return f"{entry.optimizer.replace(':', '-')}-{seed}-{digest}"


@cache
def _weights_sha256(path: Path, written_at: int, size: int) -> str:
    """A file's hash, once for each state of it."""
    return sha256(path)
