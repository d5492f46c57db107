"""Constructor keywords as data, from which signature, binding, defaults and `help` are made."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..projectors import REFRESH_MODES
from ..rules import MOMENT_TRANSPORTS
from . import checks
from .strategies import PROJECTORS, RESIDUALS, SCHEDULES, STORAGES

Role = Literal["option", "given", "no effect"]


@dataclass(frozen=True)
class Keyword:
    """A keyword of a constructor.

    Attributes:
        name: as the official code calls it.
        default: as the signature shows it.
        doc: a sentence for `help`.
        role: "option" is a key of every group, with this default; "given" counts only where it is
            given (another spelling, or an option of one strategy); "no effect" is accepted so that
            calls of the official class work, and a value that differs from the default warns.
        accepted: the accepted values, if they are few.
        before: the positional keyword that it precedes; None appends it.
    """

    name: str
    default: Any
    doc: str
    role: Role = "option"
    accepted: tuple[Any, ...] | None = None
    before: str | None = None


@dataclass(frozen=True)
class Constructor:
    """What a class's constructor accepts after `params`.

    Attributes:
        by_position: keywords in the official order, accepted by position too.
        by_name: further keywords.
        others: further accepted names, and the option value that each belongs to:
            {"limiter": "residual='norm_scaled'"}.
        needs_params: whether `params` must be given.
    """

    by_position: tuple[Keyword, ...] = ()
    by_name: tuple[Keyword, ...] = ()
    others: Mapping[str, str] | None = None
    needs_params: bool = True

    @property
    def keywords(self) -> dict[str, Keyword]:
        """All keywords by name, without `others`."""
        return {keyword.name: keyword for keyword in (*self.by_position, *self.by_name)}

    def names(self) -> set[str]:
        """Every accepted name."""
        return {*self.keywords, *(self.others or {})}

    def defaults(self) -> dict[str, Any]:
        """The group keys that keywords stand for, with their defaults."""
        return {k.name: k.default for k in self.keywords.values() if k.role == "option"}

    def bind(self, owner: str, args: Sequence[Any], options: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call by name; names are not checked.

        Raises:
            TypeError: too many arguments, or one is given twice.
        """
        names = [keyword.name for keyword in self.by_position]
        if len(args) > len(names):
            raise TypeError(
                f"{owner} takes params and {len(names)} further arguments by position "
                f"({', '.join(names)}), but {len(args)} were given"
            )
        given = dict(zip(names, args, strict=False))
        for name in names:
            if name in given and name in options:
                raise TypeError(f"{owner} got {name} by position and by name")
        return {**given, **options}

    def ineffective(self, given: Mapping[str, Any]) -> list[str]:
        """The given keywords whose values have no effect, as "name=value".

        Raises:
            ValueError: a value is not accepted.
        """
        found = []
        for name, value in given.items():
            keyword = self.keywords.get(name)
            if keyword is None:
                continue
            if keyword.accepted is not None:
                checks.choice(name, value, keyword.accepted)
            elif keyword.role == "no effect" and value != keyword.default:
                found.append(f"{name}={value!r}")
        return found

    def signature(self) -> inspect.Signature:
        """As `inspect.signature` shows it."""
        kind = inspect.Parameter
        first = kind("params", kind.POSITIONAL_OR_KEYWORD)
        parameters = [first if self.needs_params else first.replace(default=None)]
        for keyword in self.by_position:
            default = keyword.default
            parameters.append(kind(keyword.name, kind.POSITIONAL_OR_KEYWORD, default=default))
        for keyword in self.by_name:
            parameters.append(kind(keyword.name, kind.KEYWORD_ONLY, default=keyword.default))
        if self.others:
            parameters.append(kind("strategy_options", kind.VAR_KEYWORD))
        return inspect.Signature(parameters)

    def args_section(self) -> str:
        """The `Args:` and `Raises:` sections of a docstring."""
        entries = {"params": "parameters, named parameters or groups, as for `torch.optim`."}
        for keyword in (*self.by_position, *self.by_name):
            entries[keyword.name] = f"{keyword.doc} Default {keyword.default!r}."
        if self.others:
            belonging = ", ".join(f"{name} ({where})" for name, where in self.others.items())
            entries["**strategy_options"] = (
                f"accepted with the choice that each belongs to: {belonging}."
            )
        lines = ["Args:"]
        for name, text in entries.items():
            lines += textwrap.wrap(
                f"{name}: {text}", 96, initial_indent="    ", subsequent_indent="        "
            )
        lines += [
            "",
            "Raises:",
            "    TypeError: the arguments don't fit the signature.",
            "    ValueError: an option is unknown or out of range, or a parameter is not accepted.",
        ]
        return "\n".join(lines)


def ordered(keywords: Iterable[Keyword]) -> tuple[Keyword, ...]:
    """Orders keywords by position: each at the end, or before the one that it names.

    A repeated name replaces the earlier keyword at its position.
    """
    found: list[Keyword] = []
    for keyword in keywords:
        names = [known.name for known in found]
        if keyword.name in names:
            found[names.index(keyword.name)] = keyword
        elif keyword.before in names:
            found.insert(names.index(keyword.before), keyword)
        else:
            found.append(keyword)
    return tuple(found)


def documented(
    defaults: Mapping[str, Any], belonging: Mapping[str, str] | None = None
) -> tuple[Keyword, ...]:
    """Keywords for the options of `engine.options`, with their documentation.

    Args:
        defaults: names and defaults.
        belonging: the option value that each strategy's own options belong to.
    """
    docs = {name: f"an option of {where}." for name, where in (belonging or {}).items()}
    docs.update(DOCS)
    docs["projector"] = f"the subspace: {_one_of(PROJECTORS)}."  # some may be registered later
    return tuple(Keyword(name, value, docs.get(name, "")) for name, value in defaults.items())


def _one_of(names: Iterable[Any]) -> str:
    return ", ".join(repr(name) for name in names)


DOCS: Mapping[str, str] = {
    "maximize": "ascend instead.",
    "foreach": "True runs lists of tensors at once, False one tensor at a time, None chooses.",
    "capturable": "keep step counts on the device, so that steps between refreshes can be captured "
    "in a CUDA graph (where the rule supports it).",
    "differentiable": "must be False; differentiating through `step` is not supported.",
    "fused": "torch's fused Adam kernel, for parameters that are not projected and whose moments "
    "have their precision: None and True use it, False doesn't. True warns where it never applies.",
    "compile": "`torch.compile` the update of the moments (Adam-based rules).",
    "skip_nonfinite": "leave a parameter as it is for a step in which its gradient holds NaN or "
    "infinity; on a GPU, and under `capturable`, see docs/gpu_steps.md.",
    "moments_dtype": "precision of the moments, 'float32' or 'bfloat16'; None is fp32 under "
    "16-bit weights, else the weight's own. Moments in 8 bits accept None.",
    "refresh": f"how singular vectors are computed: {_one_of(REFRESH_MODES)}; None is 'randomized' "
    "for parameters on CUDA and 'eigh' elsewhere, which the group then has as its value.",
    "schedule": f"when a matrix is refitted: {_one_of(SCHEDULES)}.",
    "stagger": "spread the matrices' refreshes over the steps of a gap; None is True on CUDA for "
    "gaps of 50 or more, else False, which the group then has as its value.",
    "basis": f"how bases are stored: {_one_of(STORAGES)}; None is the weight's precision.",
    "residual": f"the gradient outside the subspace: {_one_of(RESIDUALS)}.",
    "moments": f"the moments when the subspace moves: {_one_of(MOMENT_TRANSPORTS)}.",
    "projection_dtype": "precision of the projection GEMMs ('bfloat16', ...); None is the "
    "weight's.",
    "stochastic_rounding": "round bf16 weights up or down with probabilities that keep the mean, "
    "so that updates below their precision are not lost; quantised weights always are.",
    "seed": "of everything random.",
    "update_proj_gap": "steps between refreshes of the subspace.",
    "scale": "factor on the back-projected update.",
}
