"""The declarations of a method's class, and the constructor that is generated from them."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from . import checks
from .keywords import Constructor, Keyword, documented, ordered
from .options import COMMON_DEFAULTS, PROJECTION_DEFAULTS, Group, ProjectionOptions, make_plain
from .rule_families import RuleFamily
from .strategies import ON_CHANGE, check_strategy_options, strategy_option_owners, strategy_options
from .warn import warn_user


class DeclaredOptimizer(Optimizer):
    """An optimizer whose constructor is generated from the attributes of its class.

    A subclass may define its own `__init__`, which calls this one with the keywords below.
    """

    #: The update rule, and the constructor's keywords for it.
    rule: ClassVar[RuleFamily]
    #: Whether a group with `rank` is projected; baselines ignore the key.
    projects: ClassVar[bool] = True
    #: Whether step counts may stay on the device; by default the rule family's value.
    supports_capturable: ClassVar[bool] = False
    #: Defaults of projection keywords that differ for this method.
    projection_defaults: ClassVar[Mapping[str, Any]] = {}
    #: Further keywords of the constructor, added to those of the base classes.
    own_keywords: ClassVar[tuple[Keyword, ...]] = ()
    #: Other names of group keys, as in the official code: {alias: our name}.
    aliases: ClassVar[Mapping[str, str]] = {}
    #: Group keys of the official code that `translate` accepts.
    foreign_keys: ClassVar[tuple[str, ...]] = ()
    #: Keys of `ProjectionOptions` that a method without projection uses in its own groups.
    hidden_keys: ClassVar[tuple[str, ...]] = ()
    #: Where a method doesn't project, the group key by which a group is the method's (any value but
    #: None and False) or is trained as embeddings and norms are.
    marked_by: ClassVar[str | None] = None
    #: Its name in the table of methods.
    registered: ClassVar[str] = ""
    #: Whether the constructor requires `params`; otherwise `collect` supplies them.
    needs_params: ClassVar[bool] = True
    #: The constructor's signature, generated from the above.
    constructor: ClassVar[Constructor] = Constructor()
    __signature__: ClassVar[inspect.Signature | None]
    #: The docstring without the arguments, once the class is in the table.
    described: ClassVar[str | None] = None

    def __init_subclass__(cls, **arguments: Any) -> None:
        """Makes the class's constructor and its signature."""
        super().__init_subclass__(**arguments)
        family = vars(cls).get("rule")
        if family is not None and "supports_capturable" not in vars(cls):
            cls.supports_capturable = family.capturable
        cls._derive()

    @classmethod
    def _derive(cls) -> None:
        """Makes constructor, signature and documentation from the declarations."""
        cls.constructor = _constructor_of(cls)
        # A class that defines `__init__` keeps that signature.
        owner = next(base for base in cls.__mro__ if "__init__" in vars(base))
        generic = owner is DeclaredOptimizer
        cls.__signature__ = cls.constructor.signature() if generic else None
        if vars(cls).get("described") is not None:
            cls.__doc__ = f"{cls.described}\n\n{cls.constructor.args_section()}"

    def __init__(self, params: ParamsT | None = None, *args: Any, **options: Any) -> None:
        """Checks the groups and makes their state; the class's docstring lists the arguments.

        Raises:
            TypeError: the arguments don't fit the signature.
            ValueError: an option is unknown or out of range, or a parameter can't be optimized.
        """
        name, constructor = type(self).__name__, self.constructor
        given = constructor.bind(name, args, options)
        make_plain(given)
        self._check_names(given)
        ineffective = constructor.ineffective(given)
        if ineffective:
            warnings.warn(f"{name}: {', '.join(ineffective)} has no effect here", stacklevel=2)
        collected = self.collect(params, given)
        given = self.translate(self._renamed(given), None)
        roles = {keyword.name: keyword.role for keyword in constructor.keywords.values()}
        given = {key: value for key, value in given.items() if roles.get(key) != "no effect"}
        defaults = {**constructor.defaults(), **given}
        if self.projects:
            check_strategy_options(given, strategy_options({"rank": 1, **defaults}))
        if hasattr(type(self), "rule"):
            defaults = self.rule.complete(defaults)
        self._make_attributes()
        super().__init__(_own_groups(collected), defaults)
        self._begin()
        self._warn_of_groups()
        self._warn_of_fused()

    def _begin(self) -> None:
        """Called once all groups of the constructor are there."""

    @classmethod
    def is_marked(cls, group: Group) -> bool:
        """Whether `marked_by` gives a group to the method."""
        mark = None if cls.marked_by is None else group.get(cls.marked_by)
        return mark is not None and mark is not False

    def _warn_of_groups(self) -> None:
        """Warns if the method does nothing: no group is projected, or has its mark."""
        name = type(self).__name__
        if self.projects and not any(ProjectionOptions.of(group) for group in self.param_groups):
            warn_user(
                f"{name}: no parameter group has a rank, so nothing is projected; "
                "param_groups(model) makes groups that are"
            )
        if self.marked_by is not None and not any(map(self.is_marked, self.param_groups)):
            warn_user(
                f"{name}: no parameter group has {self.marked_by}, so all are trained as "
                f"embeddings and norms are; build({self.registered!r}, model) sorts parameters"
            )

    def _warn_of_fused(self) -> None:
        """Warns if `fused=True` has no effect on any group."""

    def _make_attributes(self) -> None:
        """Creates the attributes that are not part of the state."""

    @classmethod
    def keywords(cls) -> set[str]:
        """Names of the constructor's keywords that `build` accepts."""
        return cls.constructor.names()

    @classmethod
    def group_keys(cls) -> set[str]:
        """Names of the group keys about projection; baselines ignore `ProjectionOptions`'."""
        if not cls.projects:
            return set(ProjectionOptions.names())
        own = {*cls.aliases, *cls.foreign_keys}
        return {*ProjectionOptions.names(), *strategy_option_owners(), *own}

    @classmethod
    def translate(cls, options: Group, defaults: Group | None) -> Group:
        """Translates options of the official code into ours, without side effects.

        Args:
            options: the given options, with `aliases` renamed.
            defaults: the optimizer's defaults if `options` are a group's, None if they are the
                constructor's.

        Raises:
            ValueError: a value is out of range, or two contradict each other.
        """
        return options

    @classmethod
    def collect(cls, params: ParamsT | None, given: Group) -> ParamsT:
        """The parameters or groups of a constructor call.

        Args:
            params: as given.
            given: the keywords as given; those that only select parameters are removed in place.

        Raises:
            TypeError: there are none.
        """
        if params is None:
            raise TypeError(f"{cls.__name__} needs params: parameters or groups")
        return params

    @classmethod
    def _check_names(cls, given: Mapping[str, Any]) -> None:
        known = cls.constructor.names()
        for name in given.keys() - known:
            if name in cls.group_keys():
                shown = f"{name}={given[name]!r}"
                raise ValueError(
                    f"{shown} is not a keyword of {cls.__name__}: {cls._place_of(name, shown)}"
                )
            raise checks.unknown_name(f"keyword of {cls.__name__}", name, known)

    @classmethod
    def _place_of(cls, name: str, shown: str) -> str:
        """Where to give an option that is no constructor keyword; `shown` is "name=value"."""
        if name in cls.hidden_keys:
            return f"it belongs in groups of hidden matrices, as build makes them with {shown}"
        if not cls.projects:
            return "it does not project (build accepts the option, and warns that it has no effect)"
        return f"it belongs in parameter groups, as param_groups(model, {shown}) makes them"

    @classmethod
    def _renamed(cls, options: Mapping[str, Any]) -> Group:
        """Options with aliases replaced.

        Raises:
            ValueError: one is given under two names.
        """
        renamed = dict(options)
        for alias, name in cls.aliases.items():
            if alias not in renamed:
                continue
            if name in renamed:
                raise ValueError(
                    f"{alias}={renamed[alias]!r} with {name}={renamed[name]!r}: these are two "
                    "names of one thing, accepted is one of them"
                )
            renamed[name] = renamed.pop(alias)
        return renamed

    def _rename_aliases(self, group: Group) -> None:
        """In place: replaces aliases and official spellings in a new group."""
        translated = self.translate(self._renamed(group), self.defaults)
        group.clear()
        group.update(translated)


def _own_groups(params: ParamsT) -> ParamsT:
    """Copies of the groups, so that the caller's dicts are not modified."""
    if isinstance(params, Tensor):
        return params
    return [dict(entry) if isinstance(entry, dict) else entry for entry in params]  # type: ignore[return-value]


def _constructor_of(cls: type[DeclaredOptimizer]) -> Constructor:
    family: RuleFamily | None = getattr(cls, "rule", None)
    own = [k for base in reversed(cls.__mro__) for k in vars(base).get("own_keywords", ())]
    by_position = ordered((*(family.keywords if family else ()), *own))
    by_name = [*documented(COMMON_DEFAULTS)]
    others: dict[str, str] = {}
    if cls.projects:
        defaults = {**PROJECTION_DEFAULTS, **cls.projection_defaults}
        others = {name: " or ".join(at) for name, at in strategy_option_owners().items()}
        by_name += documented(defaults, others)
        chosen = strategy_options({"rank": 1, **defaults})
        by_name += [
            Keyword(name, chosen[name], f"an option of {where}.", "given")
            for name, where in others.items()
            if name in chosen and name not in defaults
        ]
    positional = {keyword.name for keyword in by_position}
    by_name = [keyword for keyword in by_name if keyword.name not in positional]
    named = positional | {keyword.name for keyword in by_name}
    others = {name: where for name, where in others.items() if name not in named}
    return Constructor(by_position, tuple(by_name), others, cls.needs_params)


def _derive_again() -> None:
    """After a change of the strategies; a class whose projector is gone says so when it is used."""
    below: list[type[DeclaredOptimizer]] = DeclaredOptimizer.__subclasses__()
    while below:
        cls = below.pop()
        with suppress(ValueError):
            cls._derive()
        below += cls.__subclasses__()


ON_CHANGE.append(_derive_again)
