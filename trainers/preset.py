"""Presets: a model size's shape and budget, and each method's published settings at that size.

One YAML file per size stands in the folder ``presets``. Its top level has ``source`` (where the
numbers come from), sections of settings, and ``methods``: for each optimizer a ``source`` and the
settings that it changes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from lowrank.optimizers import available, option_aliases
from lowrank.optimizers.registry import without_effect

from .config import ScheduleConfig
from .config_io import Layer, merge, nearest, parse_yaml
from .official import PREFIX, method_of

FOLDER = files(__package__) / "presets"


def preset_names() -> list[str]:
    """The names of the model presets, smallest model first."""
    names = [
        item.name.removesuffix(".yaml") for item in FOLDER.iterdir() if item.name.endswith(".yaml")
    ]
    return sorted(names, key=lambda name: int(read_preset(name)["model"]["hidden_size"]))


def preset_layer(model: str, optimizer: str) -> dict[str, Any]:
    """The settings of `model` with those of `optimizer` on top, as a layer of the configuration.

    A method without settings of its own at this size keeps the size's settings.

    Raises:
        ValueError: there is no such model.
    """
    preset = read_preset(model)
    method: Layer = preset.get("methods", {}).get(optimizer.removeprefix(PREFIX), {})
    common = {key: value for key, value in preset.items() if key not in ("source", "methods")}
    own = {key: value for key, value in method.items() if key != "source"}
    named = {"model": {"name": model}, "optimizer": {"name": optimizer}}
    return with_cycle(merge(named, _effective(common, optimizer), own), {})


def _effective(common: Layer, optimizer: str) -> Layer:
    """The settings of all methods, but for options that have no effect on this one."""
    section = dict(common.get("optimizer", {}))
    if optimizer not in available() or not section:
        return common
    options = {key: value for key, value in section.items() if key != "lr"}
    for option in without_effect(optimizer, options):
        del section[option]
    return {**common, "optimizer": section}


def canonical(layer: Layer, optimizer: str) -> dict[str, Any]:
    """A layer with the optimizer's options under one name each, so that layers can override.

    Raises:
        ValueError: an option is given under both of its names.
    """
    section = layer.get("optimizer")
    if not isinstance(section, Mapping):
        return dict(layer)
    renamed = dict(section)
    for alias, name in option_aliases(method_of(optimizer)).items():
        if alias in renamed:
            if name in renamed:
                raise ValueError(
                    f"optimizer.{alias} with optimizer.{name}: these are two names of one thing, "
                    "accepted is one of them"
                )
            renamed[name] = renamed.pop(alias)
    return {**layer, "optimizer": renamed}


def with_cycle(preset: Layer, settings: Layer) -> dict[str, Any]:
    """Settings over a preset; restarts of the learning rate follow the method's own cycle.

    Where the schedule is "cosine_restarts" and `schedule.cycle` isn't given, it is
    `optimizer.update_proj_gap`, and a preset's rise after each restart takes a tenth of it at most.

    Args:
        preset: the settings of a model and an optimizer.
        settings: what was given explicitly.
    """
    layer = merge(preset, settings)
    schedule, optimizer = layer.get("schedule"), layer.get("optimizer")
    if not isinstance(schedule, Mapping) or not isinstance(optimizer, Mapping):
        return layer
    gap = optimizer.get("update_proj_gap")
    given = settings.get("schedule")
    given = given if isinstance(given, Mapping) else {}
    if schedule.get("name") != "cosine_restarts" or "cycle" in given or type(gap) is not int:
        return layer
    derived = {"cycle": gap}
    rise = schedule.get("restart_warmup", ScheduleConfig().restart_warmup)
    if "restart_warmup" not in given:
        derived["restart_warmup"] = min(rise, gap // 10)
    return merge(layer, {"schedule": derived})


def read_preset(model: str) -> dict[str, Any]:
    """The whole content of a preset's file, sources included.

    Raises:
        ValueError: there is no such model.
    """
    path = FOLDER / f"{model}.yaml"
    if not model.replace("_", "").isalnum() or not path.is_file():
        known = [item.name.removesuffix(".yaml") for item in FOLDER.iterdir()]
        raise ValueError(f"model.name is {model!r}; {nearest(model, known)}")
    return copy.deepcopy(_parsed(path.read_text(encoding="utf-8"), str(path)))


@cache
def _parsed(text: str, where: str) -> dict[str, Any]:
    content: dict[str, Any] = parse_yaml(text, where)
    return content
