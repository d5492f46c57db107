"""The list of methods: ``galore_adamw,adamw+betas=[0.9,0.95],official:fira_adamw``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowrank.optimizers import available

from ..config_io import merge, parse_override
from ..official import PACKAGES, PREFIX, canonical_name, method_of
from ..preset import canonical

#: Settings beside the optimizer's that may differ from method to method.
OWN_KEYS = (
    "train.batch_size",
    "train.accumulation",
    "train.clip",
    "model.initial",
    "model.dtype",
    "model.weight_bits",
)
#: Where an option begins; a plus of a number (1e+2) or of a path doesn't.
_OPTION = re.compile(r"\+(?=[A-Za-z_][\w.]*=)")
ALL = ("all", "official:all")


@dataclass(frozen=True)
class Entry:
    """One row of a comparison: an optimizer, and settings of its own.

    Attributes:
        label: the name, and the settings as they were given.
        optimizer: as `optimizer.name` takes it.
        settings: of its own, as a layer of the configuration.
    """

    label: str
    optimizer: str
    settings: Mapping[str, Any]

    @property
    def method(self) -> str:
        """The method of ours that it is, or is the official package of."""
        return method_of(self.optimizer)

    @property
    def own_steps(self) -> bool:
        """Whether its steps are of another size than the others'."""
        train = self.settings.get("train", {})
        return "batch_size" in train or "accumulation" in train


def parse_methods(text: str) -> tuple[Entry, ...]:
    """Reads a list of methods.

    Args:
        text: names with commas between them; to each may be added ``+key=value``, an option of its
            optimizer (``+plain_rule=adamw``) or one of the settings in `OWN_KEYS` or of the
            section schedule (``+schedule.name=wsd``). "all" is every method of ours that isn't
            named before, "official:all" every official package.

    Raises:
        ValueError: a name or a key is unknown, or a method is given twice, in the same words or in
            others (options in another order, another spelling of a value).
    """
    # A comma inside brackets belongs to a value.
    names = [item.strip() for item in re.split(r",(?![^\[\]]*\])", text)]
    if not any(names):
        raise ValueError(f"--methods is {text!r}; accepted: names, `lowrank methods` lists them")
    entries: list[Entry] = []
    for name in names:
        if name in ALL:
            every = available() if name == ALL[0] else [PREFIX + each for each in PACKAGES]
            # Those that are named before have their place.
            found = [_entry(each) for each in every if each not in {e.label for e in entries}]
        else:
            found = [_entry(name)]
        entries += found
    for place, entry in enumerate(entries):
        for other in entries[:place]:
            if other.label == entry.label:
                raise ValueError(f"--methods has {entry.label} twice; accepted: each once")
            if other.optimizer == entry.optimizer and other.settings == entry.settings:
                raise ValueError(
                    f"--methods has {other.label} and {entry.label}, which are the same; accepted:"
                    " one of them"
                )
    return tuple(entries)


def _entry(text: str) -> Entry:
    name, *options = _OPTION.split(text)
    if not name:
        raise ValueError(f"--methods has {text!r}, which names no method")
    name, plus, rest = name.partition("+")
    if plus:
        raise ValueError(
            f"--methods has {text!r}: {rest!r} is not of the form key=value, as in"
            " adamw+plain_rule=adafactor"
        )
    try:
        optimizer = canonical_name(name)
    except ValueError as error:
        raise ValueError(f"--methods: {error}") from None
    settings: dict[str, Any] = {}
    for option in options:
        key, _, value = option.partition("=")
        path = key if "." in key else f"optimizer.{key}"
        if path in ("optimizer.name", "optimizer.seed") or not (
            path.startswith(("optimizer.", "schedule.")) or path in OWN_KEYS
        ):
            raise ValueError(
                f"--methods has {text!r}: {path} is the same for all methods; accepted here:"
                f" options of the optimizer, schedule.*, {', '.join(OWN_KEYS)}"
            )
        section, own = path.split(".", 1)
        if own in settings.get(section, {}):
            raise ValueError(f"--methods has {text!r}: {key} twice; accepted: each option once")
        settings = merge(settings, parse_override(f"{path}={value}"))
    label = "+".join([optimizer, *options])
    try:
        return Entry(label, optimizer, canonical(settings, optimizer))
    except ValueError as error:
        raise ValueError(f"--methods has {text!r}: {error}") from None


def parse_seeds(text: str) -> tuple[int, ...]:
    """Reads ``0,1,2``.

    Raises:
        ValueError: one is no whole number of at least 0, or is given twice.
    """
    seeds: list[int] = []
    for item in text.split(","):
        digits = item.strip()
        if not (digits.isascii() and digits.isdigit() and int(digits) < 2**32):
            raise ValueError(f"--seeds has {item!r}; accepted: whole numbers from 0, as in 0,1,2")
        if int(digits) in seeds:
            raise ValueError(f"--seeds has {int(digits)} twice; accepted: each once")
        seeds.append(int(digits))
    return tuple(seeds)


def join(former: Sequence[str], given: Sequence[str]) -> tuple[str, ...]:
    """The former labels, and those of the given ones that are new."""
    return tuple(dict.fromkeys([*former, *given]))
