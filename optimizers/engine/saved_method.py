"""The method that a saved state belongs to, compared with the optimizer that loads it.

Loading takes options as they were saved, as `torch.optim` does. Options that make the method are
an exception: a state of GaLore that is loaded into Fira would turn it into GaLore. Saved groups
record their optimizer's class under `METHOD`, which loading removes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from . import checks
from .options import NO_OPTIONS, ProjectionOptions
from .strategies import strategy_option_owners
from .warn import warn_user

Group = dict[str, Any]

METHOD = "method"
#: Options that make the method.
MAKING = ("projector", "residual")
#: Further ones, by which a state without a record of its class is told from others.
TELLING = (*MAKING, "schedule", "basis")
#: Options of how a step is computed, which change nothing but its rounding.
HOW = ("foreach", "fused", "capturable", "compile", "differentiable")
#: Options that schedulers which cycle the momentum change, and the keys by which they are known.
CYCLED, CYCLED_BY = frozenset(("betas", "momentum", "beta1")), ("base_momentum", "max_momentum")
#: Keys by which groups are sorted, and what their absence means: factors of replaced layers,
#: matrices under Muon, another rule.
SORTING = {"factors": False, "use_muon": False, "plain_rule": None}


def check_method(
    optimizer: type, groups: Sequence[Group], saved: Sequence[Group], defaults: Mapping[str, Any]
) -> None:
    """Raises `ValueError` if a saved state is another method's.

    Args:
        optimizer: the class that loads.
        groups: its groups.
        saved: the saved groups, as many.
        defaults: of options that an older version didn't save.
    """
    kinds = _accepted(optimizer)
    marks = [group[METHOD] for group in saved if METHOD in group]
    foreign = next((mark for mark in marks if mark not in kinds), None)
    differing = _differing(groups, saved, defaults, MAKING if marks and not foreign else TELLING)
    if foreign is None and not differing:
        return
    name = optimizer.__name__
    theirs = foreign or (marks[0] if marks else _named(saved))
    said = "; ".join(
        f"saved {key}={old!r}, here {key}={own!r}" for key, (old, own) in differing.items()
    )
    whose = f"the saved state is of {theirs}" if theirs else "the saved state is another method's"
    raise ValueError(
        f"{whose}, and this optimizer is {name}{f' ({said})' if said else ''}: accepted is a state "
        + (f"of {name}" if theirs != name else f"of {name} with the same options")
    )


def _accepted(optimizer: type) -> set[str]:
    """Names of a class and of those that it extends, up to the first that is a method."""
    from .method import TABLE  # its pages import the optimizer, which imports this module

    methods = {row.optimizer for row in TABLE.values()}
    names: set[str] = set()
    for kind in optimizer.__mro__:
        names.add(kind.__name__)
        if kind in methods:
            break
    return names


def _differing(
    groups: Sequence[Group],
    saved: Sequence[Group],
    defaults: Mapping[str, Any],
    making: Sequence[str],
) -> dict[str, tuple[Any, Any]]:
    """Options that make the method and differ: {name: (saved, own)}, of the first such group."""
    for group, other in zip(groups, saved, strict=True):
        found = {
            key: (other.get(key, absent), group.get(key, absent))
            for key, absent in SORTING.items()
            if _sorted_by(other.get(key, defaults.get(key))) != _sorted_by(group.get(key))
        }
        projected = [_is_projected(g) for g in (other, group)]
        if "rank" in other and projected[0] != projected[1]:
            found["rank"] = (_rank_of(other), _rank_of(group))
        elif all(projected):
            pairs = {k: (other.get(k, defaults.get(k)), group.get(k)) for k in making}
            found |= {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
        if found:
            return found
    return {}


def _sorted_by(value: Any) -> Any:
    """What a sorting key means: the method's own rule is no other rule, named or not."""
    return False if value in (None, "own") else value


def _is_projected(group: Mapping[str, Any]) -> bool:
    return group.get("rank") is not None or group.get("rank_ratio_matrix") is not None


def _rank_of(group: Mapping[str, Any]) -> Any:
    rank = group.get("rank")
    return group.get("rank_ratio_matrix") if rank is None else rank


def _named(saved: Sequence[Group]) -> str | None:
    """The class whose defaults a state without a mark has, if one is the likeliest."""
    from .method import TABLE

    projected = next((group for group in saved if _is_projected(group)), None)
    if projected is None:
        return None
    found = []
    for row in TABLE.values():
        defaults = row.optimizer.constructor.defaults()
        alike = all(defaults.get(key) == projected.get(key) for key in TELLING)
        if row.optimizer.projects and alike:
            shared = defaults.keys() & projected.keys()
            unlike = sum(not checks.same(defaults[key], projected[key]) for key in shared)
            others = len(defaults.keys() ^ projected.keys())
            found.append((unlike + others, row.optimizer.__name__))
    return min(found)[1] if found else None


def changed_options(
    groups: Sequence[Group], saved: Sequence[Group], known: Collection[str], *, projects: bool
) -> list[str]:
    """Options that a saved state changes and that change updates, as "rank: 8 (given 4)".

    Args:
        groups: the optimizer's groups.
        saved: the saved groups, as many.
        known: names of the optimizer's options.
        projects: whether the optimizer projects groups that have a rank.
    """
    found: dict[str, None] = {}
    for group, other in zip(groups, saved, strict=True):
        silent = {*MAKING, *SORTING, *HOW, *NO_OPTIONS}
        if projects and not _is_projected(group):
            silent |= {*ProjectionOptions.names(), *strategy_option_owners()} - {
                "stochastic_rounding"
            }
        if any(name in other for name in CYCLED_BY):
            silent |= CYCLED
        for name in known:
            if name in silent or name not in group or name not in other:
                continue
            if not _equal(other[name], group[name]):
                found[f"{name}={other[name]!r} (here {name}={group[name]!r})"] = None
    return sorted(found)


def _equal(value: Any, other: Any) -> bool:
    """Whether an option means the same; a list is as good as a tuple, and 0 as 0.0."""
    pair = [tuple(item) if isinstance(item, list) else item for item in (value, other)]
    if any(isinstance(item, Tensor) for item in pair):
        return checks.same(checks.plain(value), checks.plain(other))
    try:
        return bool(pair[0] == pair[1])
    except (RuntimeError, ValueError):
        return False


def warn_of_changes(optimizer: str, changed: Sequence[str]) -> None:
    """Warns of options that loading has changed."""
    if changed:
        warn_user(
            f"{optimizer}: the loaded state goes on with the options that it was saved with, "
            f"{', '.join(changed)}; to change them, set them in param_groups after load_state_dict"
        )
