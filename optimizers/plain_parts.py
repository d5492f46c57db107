"""Learning rates and a rule of their own for what is no hidden matrix: embeddings, head, norms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .engine import checks
from .engine.method import HiddenOf
from .engine.options import Group, check_lr
from .engine.plain_rules import PLAIN_RULES
from .engine.warn import warn_user
from .layers.base import FactoredLinear
from .param_groups import is_sized, split
from .roles import EMBEDDINGS, heads_of
from .targets import Patterns

#: Options of `build`, and what they are the rates of.
APART = {"embedding_lr": "embedding", "head_lr": "output head"}


def with_own_rates(
    model: nn.Module, groups: Sequence[Group], options: Mapping[str, Any]
) -> list[Group]:
    """Groups in which embeddings and head have groups of their own, where there is a rate for them.

    Args:
        model: the model. Its embeddings are `nn.Embedding`; its head is
            `model.get_output_embeddings()`, or where a model has no such method its last linear
            layer.
        groups: of all parameters that are trained.
        options: `embedding_lr` and `head_lr`; None is no rate of its own.

    Raises:
        ValueError: a rate is no number of at least 0, the model has no such weight that is trained,
            or it is an embedding's and the head's at once.
    """
    made = list(groups)
    rates = {option: options[option] for option in APART if options.get(option) is not None}
    if not rates:
        return made
    weights = {option: _weights(model, option) for option in APART}
    shared = set.intersection(*weights.values())
    for option, rate in rates.items():
        check_lr(rate, option)
        wanted = weights[option]
        if shared:
            raise ValueError(
                f"{option}={rate}: an embedding and the head share a weight; accepted is plain_lr"
            )
        _warn_of_heads(model, option, rate)
        if not any(param in wanted for group in made for param in group["params"]):
            raise ValueError(f"{option}={rate}: the model has no {APART[option]} that is trained")
        made = [part for group in made for part in _parted(group, wanted, {"lr": rate})]
    # The first group is there even where it is empty, as methods make it.
    return [group for at, group in enumerate(made) if group["params"] or at == 0]


def with_plain_rule(
    model: nn.Module,
    groups: Sequence[Group],
    options: Mapping[str, Any],
    hidden_of: HiddenOf | None = None,
) -> list[Group]:
    """Groups in which what is no hidden matrix has the rule that is asked for.

    Args:
        model: the model.
        groups: of all parameters that are trained.
        options: `plain_rule`, one of `PLAIN_RULES`, and `patterns` as in `param_groups`.
        hidden_of: see `engine.method.Method.hidden`.

    Raises:
        ValueError: the rule is unknown.
    """
    rule = options.get("plain_rule")
    checks.choice("plain_rule", rule, (None, *PLAIN_RULES))
    if rule in (None, "own"):
        return list(groups)
    kept = set(_hidden(model, options.get("patterns"), hidden_of))
    made: list[Group] = []
    for group in groups:
        if is_sized(group) or group.get("factors"):
            made.append(group)
        else:
            wanted = set(group["params"]) - kept
            made += _parted(group, wanted, {"plain_rule": rule})
    return [group for at, group in enumerate(made) if group["params"] or at == 0]


def _warn_of_heads(model: nn.Module, option: str, rate: Any) -> None:
    names = [name for name, _ in heads_of(model)] if option == "head_lr" else []
    if len(names) > 1:
        warn_user(
            f"head_lr={rate} is for {names[-1]}, the last linear layer that is not projected: "
            f"{', '.join(names[:-1])} may be heads too and keep plain_lr"
        )


def _hidden(model: nn.Module, patterns: Patterns, hidden_of: HiddenOf | None) -> list[nn.Parameter]:
    if hidden_of is not None:
        return hidden_of(model, patterns)
    if any(isinstance(module, FactoredLinear) for module in model.modules()):
        return []  # groups of factors say so
    return [param for _, param in split(model, patterns)[0]]


def _weights(model: nn.Module, option: str) -> set[Tensor]:
    if option == "head_lr":
        heads = heads_of(model)
        return {weight for _, weight in heads[-1:]}
    return {module.weight for module in model.modules() if isinstance(module, EMBEDDINGS)}


def _parted(group: Group, wanted: set[Tensor], changed: Group) -> list[Group]:
    """A group without some parameters, and one of these with changed options."""
    apart = [param in wanted for param in group["params"]]
    if not any(apart):
        return [group]
    parts = []
    for inside, more in ((False, {}), (True, changed)):
        part = {**group, **more}
        for key in ("params", "param_names"):
            if key in group:
                pairs = zip(group[key], apart, strict=True)
                part[key] = [value for value, own in pairs if own is inside]
        parts.append(part)
    return parts
