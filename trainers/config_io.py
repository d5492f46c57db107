"""From files, presets and flags to one `RunConfig`, and back to YAML.

Layers are nested mappings; a later layer replaces single keys of an earlier one. Whatever a person
can get wrong (a misspelt key, a wrong type) raises `ValueError` naming the key, the value and what
is accepted.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from .config import OptimizerConfig, RunConfig
from .files import write_text
from .missing import require

Layer = Mapping[str, Any]
#: Aliases of aliases make very many values of a few lines.
MOST_VALUES = 10_000
Section = TypeVar("Section")

# Keys that may differ when a run goes on: they change where and how it is computed, kept or shown,
# not what is computed.
FREE_ON_RESUME = frozenset(
    {
        "checkpoint.every",
        "checkpoint.keep",
        "checkpoint.best",
        "distributed.strategy",
        "distributed.zero_stage",
        "distributed.low_rank_gradients",
        "distributed.timeout",
        "log.progress",
        "log.memory_steps",
        "log.wandb",
        "log.wandb_project",
        "log.optimizer_time",
        "train.device",
        "train.threads",
        "train.max_skips",
        "train.update_in_backward",
        "model.activation_checkpointing",
        "model.compile",
    }
)


def nearest(name: str, known: Iterable[str]) -> str:
    """Words that help with a misspelt name: the nearest known one, or all of them."""
    options = sorted(known)
    matches = difflib.get_close_matches(name, options, n=1, cutoff=0.6)
    return f"did you mean {matches[0]!r}?" if matches else f"accepted: {', '.join(options)}"


def merge(*layers: Layer) -> dict[str, Any]:
    """Layers nested mappings; the last one that has a key wins."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            before = merged.get(key)
            if isinstance(value, Mapping):
                merged[key] = merge(before if isinstance(before, Mapping) else {}, value)
            else:
                merged[key] = value
    return merged


def from_mapping(values: Layer) -> RunConfig:
    """Builds a checked `RunConfig` from a nested mapping; what is absent keeps its default.

    Raises:
        ValueError: a key is unknown, or a value has the wrong type or is out of range.
    """
    sections = {item.name: item.type for item in dataclasses.fields(RunConfig)}
    hints = typing.get_type_hints(RunConfig)
    arguments: dict[str, Any] = {}
    for name, content in values.items():
        if name not in sections:
            raise ValueError(
                f"unknown section {name!r} in the configuration; {nearest(str(name), sections)}"
            )
        if content is None:
            continue
        if not isinstance(content, Mapping):
            raise ValueError(f"{name} is {content!r}; accepted: a mapping of keys to values")
        if name == "optimizer":
            arguments[name] = _optimizer_section(content)
        else:
            arguments[name] = _section(hints[name], name, content)
    return RunConfig(**arguments)


def to_mapping(config: RunConfig) -> dict[str, dict[str, Any]]:
    """The nested mapping from which `from_mapping` makes an equal configuration."""
    result: dict[str, dict[str, Any]] = {}
    for item in dataclasses.fields(RunConfig):
        section = getattr(config, item.name)
        values = {part.name: getattr(section, part.name) for part in dataclasses.fields(section)}
        if item.name == "optimizer":
            values = {"name": section.name, "lr": section.lr, **section.options}
        result[item.name] = values
    return result


def flatten(values: Layer, prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by dots: ``{"train": {"steps": 1}}`` becomes ``{"train.steps": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def parse_override(text: str) -> dict[str, dict[str, Any]]:
    """Reads one ``section.key=value`` of the command line; the value is read as YAML.

    Raises:
        ValueError: there is no ``=``, no dot, or the value isn't YAML.
    """
    path, separator, value = text.partition("=")
    section, dot, key = path.strip().partition(".")
    if not separator or not dot or not section or not key or "." in key:
        raise ValueError(f"--set {text!r} is not of the form section.key=value")
    return {section: {key: parse_yaml(value, f"--set {path}")}}


def read_layer(path: Path) -> dict[str, Any]:
    """Reads a YAML file that holds sections of settings.

    Raises:
        ValueError: the file is missing, unreadable or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"cannot read the configuration {path}: {reason}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"the configuration {path} is not UTF-8 text: {error}") from None
    values = parse_yaml(text, str(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}; accepted: a mapping of sections")
    for name, content in values.items():
        # Now: a layer above with keys of this section would hide it.
        if content is not None and not isinstance(content, Mapping):
            raise ValueError(
                f"{path}: {name} is {content!r}; accepted: a mapping of keys to values"
            )
    return values


def write_config(config: RunConfig, path: Path) -> None:
    """Saves the resolved configuration as YAML, atomically."""
    yaml = require("yaml", "train")
    text = yaml.safe_dump(_plain(to_mapping(config)), sort_keys=False, default_flow_style=None)
    write_text(path, text)


def parse_yaml(text: str, where: str) -> Any:
    """Parses YAML, with ``1e-3`` a number and a repeated key an error.

    Raises:
        ValueError: the text isn't YAML; `where` names it.
    """
    yaml = require("yaml", "train")
    try:
        value = yaml.load(text, Loader=_loader())
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply") from None
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{where} is not valid YAML: {reason}") from None
    except ValueError as error:  # of a date or a number that is none
        raise ValueError(f"{where} is not valid YAML: {error}") from None
    left, pending = MOST_VALUES, [value]
    while pending:
        item, left = pending.pop(), left - 1
        if left < 0:
            raise ValueError(
                f"{where} has more than {MOST_VALUES:,} values, or one that contains itself"
            )
        inside = item.values() if isinstance(item, dict) else item
        pending.extend(inside if isinstance(item, dict | list) else ())
    return value


def changed_keys(saved: RunConfig, now: RunConfig) -> list[tuple[str, Any, Any]]:
    """The settings in which two configurations differ and which a resumed run may not change.

    Returns:
        (dotted key, saved value, present value) for each, in the order of the sections.
    """
    before, after = flatten(to_mapping(saved)), flatten(to_mapping(now))
    keys = [*before, *(key for key in after if key not in before)]
    return [
        (key, before.get(key), after.get(key))
        for key in keys
        if key not in FREE_ON_RESUME and _plain(before.get(key)) != _plain(after.get(key))
    ]


def _section(kind: type[Section], name: str, content: Layer) -> Section:
    hints = typing.get_type_hints(kind)
    arguments = {}
    for key, value in content.items():
        if key not in hints:
            raise ValueError(f"unknown key {name}.{key}; {nearest(str(key), hints)}")
        arguments[key] = _typed(hints[key], f"{name}.{key}", value)
    return kind(**arguments)


def _optimizer_section(content: Layer) -> OptimizerConfig:
    options = {str(key): value for key, value in content.items() if key not in ("name", "lr")}
    for key, value in options.items():
        if isinstance(value, Mapping):
            raise ValueError(f"optimizer.{key} is {value!r}; accepted: a plain value or a list")
    named = {key: content[key] for key in ("name", "lr") if key in content}
    hints = typing.get_type_hints(OptimizerConfig)
    typed = {key: _typed(hints[key], f"optimizer.{key}", value) for key, value in named.items()}
    return OptimizerConfig(options=options, **typed)


_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def _typed(hint: Any, key: str, value: Any) -> Any:
    accepted = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for kind in accepted:
        if kind is type(None) and value is None:
            return None
        if kind is bool and isinstance(value, bool):
            return value
        if kind is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
            if math.isfinite(value):
                return float(value)
        elif kind is str and isinstance(value, str):
            return value
    words = " or ".join(_WORDS.get(kind, "nothing") for kind in accepted)
    raise ValueError(f"{key} is {value!r}; accepted: {words}")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


@cache
def _loader() -> Any:
    yaml = require("yaml", "train")

    class Loader(yaml.SafeLoader):  # type: ignore[misc, name-defined]
        """YAML 1.1 as PyYAML reads it, but ``1e-3`` is a number and no key may be given twice."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen = set()
            for key_node, _ in node.value:
                key = key_node.value
                if not isinstance(key, str):
                    continue
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key!r} is given twice", key_node.start_mark
                    )
                seen.add(key)
            return super().construct_mapping(node, deep)

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
        list("-+0123456789."),
    )
    return Loader
