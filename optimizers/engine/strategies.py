"""Projectors, schedules, storages and residuals by name, and the projection of a group."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import cache
from typing import Any, NamedTuple, TypeVar

import torch

from ..projectors import (
    BlockPowerProjector,
    CoordinateProjector,
    CorrelationProjector,
    CrossHeadProjector,
    DCTProjector,
    OnlineProjector,
    Projector,
    RandomProjector,
    SingularProjector,
    SwitchedProjector,
)
from ..residuals import (
    ColumnScaled,
    Dropped,
    ErrorFeedback,
    NormScaled,
    Residual,
    RowNormalised,
    ScaledGradient,
    SignResidual,
    WeightNormalised,
)
from ..schedules import EveryK, LazyLayerwise, Once, Schedule
from ..storage import BasisStorage, DenseBasis, Int4Basis, Int8Basis
from . import checks
from .composition import Projection
from .options import ProjectionOptions

PROJECTORS: dict[str, type[Projector]] = {
    "block_power": BlockPowerProjector,
    "coap": CorrelationProjector,
    "cross_head": CrossHeadProjector,
    "coordinate": CoordinateProjector,
    "dct": DCTProjector,
    "online": OnlineProjector,
    "random": RandomProjector,
    "singular": SingularProjector,
    "switched": SwitchedProjector,
}
SCHEDULES: dict[str, type[Schedule]] = {
    "every": EveryK,
    "lazy": LazyLayerwise,
    "once": Once,
}
#: Storage class and its arguments by name; None is a group's `basis=None`.
STORAGES: dict[str | None, tuple[type[BasisStorage], dict[str, Any]]] = {
    None: (DenseBasis, {}),
    "float32": (DenseBasis, {"dtype": torch.float32}),
    "bfloat16": (DenseBasis, {"dtype": torch.bfloat16}),
    "int8": (Int8Basis, {}),
    "int4": (Int4Basis, {}),
}
RESIDUALS: dict[str, type[Residual]] = {
    "column_scaled": ColumnScaled,
    "dropped": Dropped,
    "error_feedback": ErrorFeedback,
    "norm_scaled": NormScaled,
    "row_normalised": RowNormalised,
    "scaled": ScaledGradient,
    "sign": SignResidual,
    "weight_normalised": WeightNormalised,
}

#: Called after the tables above have changed.
ON_CHANGE: list[Callable[[], None]] = []

_Projector = TypeVar("_Projector", bound=type[Projector])


def register_projector(name: str) -> Callable[[_Projector], _Projector]:
    """Decorator: makes a projector available as `projector=name`, to every projecting method.

    Its `OPTIONS` are keys of groups, of `build` and of constructors, and `help` lists them. A saved
    state that names it needs it to be registered before it is loaded.

    Args:
        name: what groups call it.

    Raises:
        ValueError: the name is taken.
        TypeError: the class is no `Projector`, or has abstract methods.
    """

    def enter(projector: _Projector) -> _Projector:
        if name in PROJECTORS:
            raise ValueError(
                f"projector {name!r} is {PROJECTORS[name].__name__} already: accepted is another "
                "name"
            )
        if not (isinstance(projector, type) and issubclass(projector, Projector)):
            raise TypeError(f"{projector!r} is no Projector: accepted is a subclass of it")
        if inspect.isabstract(projector):
            raise TypeError(
                f"{projector.__name__} lacks {sorted(projector.__abstractmethods__)}: accepted is "
                "a class that has all methods"
            )
        PROJECTORS[name] = projector
        _changed()
        return projector

    return enter


def unregister_projector(name: str) -> None:
    """Removes a projector from the table.

    Raises:
        KeyError: the name is unknown.
    """
    del PROJECTORS[name]
    _changed()


def _changed() -> None:
    strategy_option_owners.cache_clear()
    strategy_defaults.cache_clear()
    for listener in ON_CHANGE:
        listener()


_Strategy = type[Projector] | type[Schedule] | type[BasisStorage] | type[Residual]


class Strategies(NamedTuple):
    """One class of each kind of strategy."""

    projector: type[Projector]
    schedule: type[Schedule]
    storage: type[BasisStorage]
    residual: type[Residual]


@cache
def strategy_option_owners() -> dict[str, list[str]]:
    """Options of single strategies, and the strategies that have them:

    {"limiter": ["residual='norm_scaled'", ...]}.
    """
    found: dict[str, list[str]] = {}
    tables: dict[str, Mapping[Any, Any]] = {
        "projector": PROJECTORS,
        "schedule": SCHEDULES,
        "basis": STORAGES,
        "residual": RESIDUALS,
    }
    for seam, table in tables.items():
        for name, entry in table.items():
            strategy = entry[0] if isinstance(entry, tuple) else entry
            for option in strategy.OPTIONS:
                if option not in ProjectionOptions.names():
                    found.setdefault(option, []).append(f"{seam}={name!r}")
    return found


@cache
def strategy_defaults() -> dict[str, Any]:
    """Options of single strategies, with their defaults."""
    found: dict[str, Any] = {}
    for table in (PROJECTORS, SCHEDULES, {k: v[0] for k, v in STORAGES.items()}, RESIDUALS):
        for strategy in table.values():
            found |= {
                f.name: f.default for f in fields(strategy) if f.name in strategy_option_owners()
            }
    return found


def _strategies_of(options: ProjectionOptions) -> Strategies:
    checks.choice("projector", options.projector, PROJECTORS)
    checks.choice("schedule", options.schedule, SCHEDULES)
    checks.choice("basis", options.basis, STORAGES)
    checks.choice("residual", options.residual, RESIDUALS)
    return Strategies(
        PROJECTORS[options.projector],
        SCHEDULES[options.schedule],
        STORAGES[options.basis][0],
        RESIDUALS[options.residual],
    )


def strategy_options(group: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a group's strategies, with defaults for those that are not given.

    Raises:
        ValueError: a strategy's name is unknown.
    """
    options = ProjectionOptions.of(group)
    if options is None:
        return {}
    own: dict[str, Any] = {}
    for strategy in _strategies_of(options):
        defaults = {f.name: f.default for f in fields(strategy)}
        own |= {name: group.get(name, defaults[name]) for name in strategy.OPTIONS}
    return own


def check_strategy_options(given: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raises `ValueError` for a given option of a strategy that was not chosen.

    Args:
        given: the options that the user gave.
        own: `strategy_options` of the group.
    """
    for name, where in strategy_option_owners().items():
        if name in given and name not in own:
            raise ValueError(f"{name}={given[name]!r}: accepted with {' or '.join(where)}")


def drop_left_over(
    group: dict[str, Any], options: Mapping[str, Any], defaults: Mapping[str, Any]
) -> None:
    """In place: removes options that were added for a previous strategy and the new one lacks.

    Args:
        group: current options.
        options: options when the group was completed.
        defaults: of the optimizer; a value that differs from its default was given by the user
            and is kept.
    """
    own = strategy_options(group)
    for name, value in strategy_defaults().items():
        left_over = name in group and name not in own and name in options
        wanted = (options.get(name), defaults.get(name, value))
        if left_over and all(checks.same(group[name], other) for other in wanted):
            del group[name]


def projection_of(group: Mapping[str, Any]) -> Projection | None:
    """A group's projector, schedule, storage and residual; None for a group without a rank.

    Raises:
        ValueError: an option is out of range, or strategies don't go together.
    """
    options = ProjectionOptions.of(group)
    if options is None:
        return None
    chosen = _strategies_of(options)
    own = strategy_options(group)

    def arguments(strategy: _Strategy) -> dict[str, Any]:
        return {name: own[name] for name in strategy.OPTIONS}

    stored = chosen.storage(**STORAGES[options.basis][1], **arguments(chosen.storage))
    return Projection(
        projector=chosen.projector(
            storage=stored, dtype=options.dtype, seed=options.seed, **arguments(chosen.projector)
        ).for_group(group),
        schedule=chosen.schedule(
            gap=options.update_proj_gap, stagger=bool(options.stagger), **arguments(chosen.schedule)
        ),
        residual=chosen.residual(scale=options.scale, **arguments(chosen.residual)).for_group(
            group
        ),
        options=options,
    )
