"""The table of methods: a class enters it with the decorator `method` on its page.

    @method("fira_adamw", paper="2410.01623", summary="Fira", state="m r + 2 n r")
    class FiraAdamW(LowRankOptimizer):
        rule = ADAMW
        projection_defaults = {"residual": "norm_scaled"}

Signature, `help`, `build`, `available`, `lowrank methods` and the export from `lowrank.optimizers`
are derived from it. A page in `methods` is found by itself; beside it a method needs a row in the
tests' table, and for type checkers its import in `optimizers/__init__.py`. Class attributes are
listed in `DeclaredOptimizer`, update rules in `rule_families`, the other parts in `strategies`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from torch import nn

from ..layers import FactoredLinear
from ..layers.convert import to_factored
from ..param_groups import factored_groups, param_groups, plain_groups
from ..targets import Patterns
from ..weights.convert import OPTIONS, to_quantized
from .optimizer import LowRankOptimizer
from .options import OF_BUILD, OF_SOME_METHOD, Group

GroupMaker = Callable[..., list[Group]]
HiddenOf = Callable[[nn.Module, Patterns], list[nn.Parameter]]
_Optimizer = TypeVar("_Optimizer", bound=LowRankOptimizer)


@dataclass(frozen=True)
class Conversion:
    """A change of a model's parametrisation, in place; converted layers are left unchanged.

    Attributes:
        apply: changes the model; takes `patterns` and the options.
        options: names of its own options.
        replaces_layers: whether it replaces layers, so that other parameters are trained.
        weight_bits: width of the weights unless the option of that name is given; None for dense
            ones.
    """

    apply: Callable[..., None]
    options: tuple[str, ...]
    replaces_layers: bool = False
    weight_bits: int | None = None

    @classmethod
    def to_quantized(cls, weight_bits: int | None = None) -> Conversion:
        """The conversion of methods that leave layers as they are: quantised weights, if asked for.

        Args:
            weight_bits: see `Conversion`.
        """
        apply = partial(to_quantized, default_bits=weight_bits)
        return cls(apply, OPTIONS, weight_bits=weight_bits)

    @classmethod
    def to_layers(cls, kind: type[FactoredLinear], *options: str, **fixed: Any) -> Conversion:
        """A conversion to layers of `kind`, with these options besides `rank` and `seed`.

        Args:
            kind: the layer.
            *options: names.
            **fixed: defaults of options, or fixed arguments.
        """
        names = ("rank", "seed", *options)
        return cls(partial(to_factored, kind=kind, **fixed), names, replaces_layers=True)


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        name: snake-case name.
        optimizer: its class.
        summary: one line of text.
        state: optimizer state of an m x n matrix, m <= n, at rank r: entries of the weight's
            precision, or bytes where stated.
        weights: the same for what replaces the weight, if that isn't m n entries.
        paper: arXiv number.
        groups: makes parameter groups from a model and the options of groups.
        build: constructor arguments that `build` sets unless they are given.
        conversion: the method's change of the model.
        spellings: other names of the class.
        hidden: of a model and `patterns`, the parameters that the method takes for hidden matrices,
            where these are not those that `param_groups` would project.
    """

    name: str
    optimizer: type[LowRankOptimizer]
    summary: str
    state: str
    weights: str | None
    paper: str | None
    groups: GroupMaker
    build: Mapping[str, Any] = field(default_factory=dict)
    conversion: Conversion = field(default_factory=Conversion.to_quantized)
    spellings: tuple[str, ...] = ()
    hidden: HiddenOf | None = None

    def description(self) -> str:
        """The summary and the paper."""
        return f"{self.summary} (arXiv {self.paper})" if self.paper else self.summary

    def linked(self) -> str:
        """The summary and a link to the paper, in markdown."""
        if self.paper is None:
            return self.summary
        return f"{self.summary} ([{self.paper}](https://arxiv.org/abs/{self.paper}))"

    def constructor_options(self) -> set[str]:
        """Names of the constructor's keywords."""
        return self.optimizer.keywords()

    def group_options(self) -> set[str]:
        """Names of the options of the groups that `build` makes; baselines ignore most of them."""
        return {*self.optimizer.group_keys(), *OF_BUILD}


TABLE: dict[str, Method] = {}


def method(
    name: str,
    *,
    summary: str,
    state: str,
    weights: str | None = None,
    paper: str | None = None,
    groups: GroupMaker | None = None,
    build: Mapping[str, Any] | None = None,
    conversion: Conversion | None = None,
    spellings: tuple[str, ...] = (),
    hidden: HiddenOf | None = None,
) -> Callable[[type[_Optimizer]], type[_Optimizer]]:
    """Decorator: registers a class in the table and appends its arguments to its docstring.

    Args:
        name: snake-case name, for `build`.
        summary: one line of text.
        state: see `Method`.
        weights: see `Method`.
        paper: arXiv number.
        groups: makes groups from (model, **options); the default depends on `projects` and
            `conversion`.
        build: constructor arguments that `build` sets unless given, besides the rule family's.
        conversion: the method's change of the model; quantised weights on request if None.
        spellings: other names of the class.
        hidden: see `Method`.

    Raises:
        ValueError: a name is taken.
    """

    def enter(optimizer: type[_Optimizer]) -> type[_Optimizer]:
        names = {optimizer.__name__, *spellings}
        for other in TABLE.values():
            taken = names & {other.optimizer.__name__, *other.spellings}
            if name == other.name or taken:
                raise ValueError(
                    f"method {name!r} of class {optimizer.__name__}: {min(taken or {name})} is "
                    f"{other.name!r} of {other.optimizer.__module__} already; accepted are other "
                    f"names, or unregister({other.name!r}) first"
                )
        optimizer.registered = name
        family = getattr(optimizer, "rule", None)
        row = TABLE[name] = Method(
            name,
            optimizer,
            summary,
            state,
            weights,
            paper,
            groups or _groups_of(optimizer, conversion),
            {**(family.build if family else {}), **(build or {})},
            conversion or Conversion.to_quantized(),
            spellings,
            hidden,
        )
        own = (row.constructor_options(), row.group_options(), row.conversion.options)
        OF_SOME_METHOD.update(*own)
        if optimizer.__doc__ is not None:
            optimizer.described = inspect.cleandoc(optimizer.__doc__)
            optimizer._derive()
        return optimizer

    return enter


def unregister(name: str) -> None:
    """Removes a method from the table.

    Raises:
        KeyError: the name is unknown.
    """
    del TABLE[name]


def exported() -> dict[str, type[LowRankOptimizer]]:
    """Every class under its name and its other spellings."""
    return {
        spelling: row.optimizer
        for row in TABLE.values()
        for spelling in (row.optimizer.__name__, *row.spellings)
    }


def _groups_of(optimizer: type[LowRankOptimizer], conversion: Conversion | None) -> GroupMaker:
    if conversion is not None and conversion.replaces_layers:
        return _factored
    return param_groups if optimizer.projects else plain_groups


def _factored(model: nn.Module, patterns: Any = None, **options: Any) -> list[Group]:
    """Groups of a converted model; `patterns` was used by the conversion."""
    return factored_groups(model, **options)
