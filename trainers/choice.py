"""Optimizers by name, as a run's settings have it: a method or an official package, and a rule for
embeddings and head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from lowrank.optimizers import accepts, build
from lowrank.optimizers.engine.options import OWN_RATES
from lowrank.optimizers.engine.plain_rules import PLAIN_RULES
from lowrank.optimizers.param_groups import split

from .config import RunConfig
from .official import PACKAGES, build_official, is_official, method_of

#: Options that a comparison searches; null is the method's own, as if they weren't given.
SEARCHED = (*OWN_RATES, "betas", "plain_rule")


def build_named(
    name: str, network: nn.Module, lr: float, options: Mapping[str, Any], total_steps: int
) -> Any:
    """Builds an optimizer by name, with a method's layers put into the network where it has such.

    The option ``plain_rule`` trains embeddings, head and norms by a rule of its own, whatever the
    method or package would do with them.

    Args:
        name: a method, or ``official:METHOD``.
        network: the model; it may be on the meta device, where nothing is computed.
        lr: learning rate.
        options: the method's own, and `plain_rule`; None of one in `SEARCHED` is as if it weren't
            there.
        total_steps: length of the run, for methods that lay a schedule out over it.

    Raises:
        ValueError: the optimizer's name, an option or its value is not accepted.
    """
    options = {k: v for k, v in options.items() if v is not None or k not in SEARCHED}
    rule = options.get("plain_rule", "own")
    if rule not in PLAIN_RULES:
        raise ValueError(
            f"optimizer.plain_rule is {rule!r}; accepted: {', '.join(PLAIN_RULES)}, null"
        )
    if is_official(name):
        return _official(name, network, lr, options)
    if accepts(name, "total_steps"):
        options.setdefault("total_steps", total_steps)
    optimizer = build(name, network, lr=lr, **options)
    optimizer.warn_of_length(total_steps)
    return optimizer


def _official(name: str, network: nn.Module, lr: float, options: dict[str, Any]) -> Any:
    """A package's optimizer, with one of ours for embeddings, head and norms where a rule is given.

    Packages know no rule beside their own.
    """
    rule = options.pop("plain_rule", "own")
    if rule == "own":
        return build_official(name, network, lr, options)
    _, matrices, vectors = split(network, options.get("patterns"))
    plain = [param for _, param in (*matrices, *vectors)]
    own = {key: value for key, value in options.items() if key not in OWN_RATES}
    with _frozen(plain):
        hidden = build_official(name, network, lr, own)
    numbers = {id(param) for param in plain}
    rest = [p for p in network.parameters() if p.requires_grad and id(p) not in numbers]
    shared = (*OWN_RATES[1:], *(("betas",) if accepts(rule, "betas") else ()))
    with _frozen(rest):
        other = build(
            rule,
            network,
            lr=options.get("plain_lr", lr),
            # The package's own, which isn't the rule's.
            weight_decay=options.get("weight_decay", 0.0),
            **{key: options[key] for key in shared if key in options},
        )
    return hidden.with_part(other)


def follows_length(config: RunConfig) -> bool:
    """Whether the method lays a schedule of its own out over the run's steps."""
    name, options = config.optimizer.name, config.optimizer.options
    own = not is_official(name) and accepts(name, "total_steps")
    return own and "total_steps" not in options


def accepts_betas(name: str) -> bool:
    """Whether a method or a package has `betas`."""
    if is_official(name):
        return "betas" in PACKAGES[method_of(name)].keywords
    return accepts(name, "betas")


@contextmanager
def _frozen(params: Sequence[nn.Parameter]) -> Iterator[None]:
    """Parameters that don't take part while an optimizer of the others is built."""
    for param in params:
        param.requires_grad_(False)
    try:
        yield
    finally:
        for param in params:
            param.requires_grad_(True)
