"""From what was asked for, and what the folder holds, to a comparison's setting."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..choice import SEARCHED
from ..config_io import from_mapping, merge
from ..data import data_fingerprint
from ..data.config import DataConfig
from ..preset import read_preset
from .entries import parse_methods
from .refining import rates_model, read_rates
from .setting import NO_METHODS, Setting, joined, read_setting, versions


@dataclass(frozen=True)
class Asked:
    """What was asked for; None takes what the folder has, or the default.

    Attributes:
        output: the comparison's folder.
        methods: a list for `parse_methods`.
        seeds: of weights and data order.
        model: a preset's name.
        data: "stdlib", "c4" or a folder.
        steps: of a run; the preset's by default.
        settings: further settings of all runs, a layer of the configuration.
        equal: "steps", "tokens" or "memory".
        tune: search the grid first.
        tune_apart: rates of embeddings and head of their own are in the grid.
        tuning_seed: of the tuning runs.
        rates: where settings found before are.
        jobs: runs at a time.
        keep_checkpoints: whether finished runs keep their last checkpoint.
        dry_run: estimate the time alone.
    """

    output: Path
    methods: str | None = None
    seeds: tuple[int, ...] | None = None
    model: str | None = None
    data: str | None = None
    steps: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    equal: str | None = None
    tune: bool | None = None
    tune_apart: bool | None = None
    tuning_seed: int | None = None
    rates: Path | None = None
    jobs: int = 1
    keep_checkpoints: bool = False
    dry_run: bool = False


def decide(asked: Asked) -> Setting:
    """The setting: what is asked for over what the folder has over the defaults.

    Raises:
        ValueError: something is wrong, or isn't what the folder holds.
    """
    former = read_setting(asked.output)
    base = former or Setting(methods=("adamw",), seeds=(0, 1, 2))
    model = base.model if asked.model is None else asked.model
    preset = read_preset(model)
    steps = asked.steps if asked.steps is not None else None
    if steps is None:
        steps = former.steps if former else int(preset["train"]["steps"])
    if asked.methods is None and former is None:
        raise ValueError(NO_METHODS)
    labels = base.methods
    if asked.methods is not None:
        labels = tuple(entry.label for entry in parse_methods(asked.methods))
    settings = merge(base.settings, asked.settings)
    data = base.data if asked.data is None else asked.data
    tune = base.tune if asked.tune is None else asked.tune
    _refuse_own(settings)
    if tune:
        _refuse_searched(settings)
    _refuse_inside(asked.output, data)
    given = dict(settings.get("data") or {})
    device = from_mapping({"train": settings.get("train")}).train.device
    source = DataConfig(source=data, **{k: v for k, v in given.items() if k == "text_key"})
    setting = Setting(
        methods=labels,
        seeds=asked.seeds or base.seeds,
        model=model,
        data=data,
        steps=steps,
        settings=settings,
        equal=asked.equal or base.equal,
        tune=tune,
        tune_apart=base.tune_apart if asked.tune_apart is None else asked.tune_apart,
        tuning_seed=base.tuning_seed if asked.tuning_seed is None else asked.tuning_seed,
        rates=read_rates(asked.rates) if asked.rates is not None else base.rates,
        data_sha256=str(data_fingerprint(source)["sha256"]),
        versions=versions(device),
    )
    return setting if former is None else joined(former, setting, asked.output)


def remarks(asked: Asked, setting: Setting) -> list[str]:
    """What a reader of the command might take for granted, and isn't so."""
    said = []
    found = None if asked.rates is None else rates_model(asked.rates)
    if found not in (None, setting.model):
        said.append(f"--rates {asked.rates} are of {found}, and are taken for {setting.model}")
    if asked.methods is not None:
        first = parse_methods(asked.methods)[0].label
        if first != setting.methods[0]:
            said.append(f"differences are to {setting.methods[0]}, the folder's first, not {first}")
    return said


def _refuse_own(settings: Mapping[str, Any]) -> None:
    flags = {
        ("model", "name"): "--model",
        ("data", "source"): "--data",
        ("train", "steps"): "--steps",
        ("train", "seed"): "--seeds",
        ("optimizer", "name"): "--methods",
        ("optimizer", "lr"): "--methods NAME+lr=VALUE",
    }
    for (section, key), flag in flags.items():
        if key in dict(settings.get(section, {})):
            raise ValueError(f"--set {section}.{key} in a comparison; accepted: {flag}")


def _refuse_searched(settings: Mapping[str, Any]) -> None:
    """Refuses one value for all methods of what is searched for each."""
    for key in settings.get("optimizer") or {}:
        if key in SEARCHED:
            raise ValueError(
                f"--set optimizer.{key} with --tune, which searches it; accepted: --methods"
                f" NAME+{key}=VALUE, or no --tune"
            )


def _refuse_inside(output: Path, data: str) -> None:
    source = Path(data).expanduser()
    if output.is_dir() and source.is_dir() and output.samefile(source):
        raise ValueError(f"--output {output} is the data's folder; choose another")
