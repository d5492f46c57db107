"""Options of a method as a plan needs them: the preset's published ones, then those given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowrank.optimizers import accepts, available, option_aliases
from lowrank.optimizers.engine import checks
from lowrank.optimizers.engine.method import TABLE

from ..config import RunConfig
from ..preset import canonical, preset_layer, preset_names
from ..strategies import method_options as trained_options

WEIGHT_BITS = (16, 8, 4)


def check_optimizer(name: str) -> None:
    """Raises `ValueError` for a name that `build` doesn't know."""
    if name not in available():
        raise checks.unknown_name("optimizer", name, available())


def known(name: str, option: str) -> bool:
    """Whether `build` has an option for a method."""
    method = TABLE[name]
    conversion = method.conversion.options if method.conversion else ()
    spellings = {*option_aliases(name), *method.constructor_options(), *method.group_options()}
    return option in spellings or option in conversion


def method_options(
    model: str, optimizer: str, given: Mapping[str, Any], weight_bits: int | None
) -> dict[str, Any]:
    """Options of `build`: the preset's, if the model is one, overridden by those given.

    Raises:
        ValueError: the optimizer is unknown, or can't have weights of so many bits.
    """
    check_optimizer(optimizer)
    options: dict[str, Any] = {"lr": 1e-3}
    if model in preset_names():
        options |= canonical(preset_layer(model, optimizer), optimizer)["optimizer"]
        del options["name"]
    options |= canonical({"optimizer": given}, optimizer)["optimizer"]
    if weight_bits is not None:
        checks.choice("weight_bits", weight_bits, WEIGHT_BITS)
        if known(optimizer, "weight_bits"):
            bits = None if weight_bits == 16 else weight_bits
            if given.get("weight_bits", bits) != bits:
                raise ValueError(
                    f"weight_bits={weight_bits} with option weight_bits={given['weight_bits']!r}: "
                    "accepted is one of the two"
                )
            options["weight_bits"] = bits
        elif weight_bits != 16:
            raise ValueError(
                f"weight_bits={weight_bits} with optimizer={optimizer!r}: accepted is 16, since "
                "the method has no quantised weights"
            )
    return options


def run_options(config: RunConfig) -> dict[str, Any]:
    """Options of `build` for a run of the trainer."""
    options = {"lr": config.optimizer.lr, **trained_options(config)}
    if accepts(config.optimizer.name, "total_steps"):
        options.setdefault("total_steps", config.train.steps)
    return options
