"""Optimizers from the settings of the Hugging Face Trainer, without transformers being imported.

`TrainingArguments` has `optim`, `optim_args` and `optim_target_modules` for galore_torch and
apollo_torch. `optimizer_from_arguments` reads the same fields for every method of this package.
"""

from __future__ import annotations

import ast
from typing import Any

from torch import nn

from .engine import checks
from .engine.method import TABLE
from .engine.optimizer import LowRankOptimizer
from .registry import accepts, available, build

#: Names of transformers for methods that have another one here.
_NAMES = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_bnb_8bit": "adamw_8bit",
    "adamw_torch_8bit": "adamw_8bit",
    "paged_adamw": "adamw",
    "paged_adamw_32bit": "adamw",
    "paged_adamw_8bit": "adamw_8bit",
}
#: What transformers takes where nothing is said.
_UNSAID = ("adamw_torch", "adamw_torch_fused")
_LAYERWISE = "_layerwise"
#: Fields that are passed on where they differ from transformers' defaults, which are these.
_DEFAULTS = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8, "weight_decay": 0.0}


def optimizer_from_arguments(
    arguments: Any, model: nn.Module, name: str | None = None, **options: Any
) -> LowRankOptimizer:
    """Builds the optimizer that the Hugging Face Trainer's arguments describe.

        optimizer = optimizer_from_arguments(arguments, model)
        Trainer(model=model, args=arguments, optimizers=(optimizer, None), ...)

    Read are `optim`, `optim_args` ("rank=128, update_proj_gap=200, scale=0.25"; options of `build`
    by any of their names), `optim_target_modules` (as `patterns`), `learning_rate`, and, where they
    differ from transformers' defaults, `adam_beta1`, `adam_beta2`, `adam_epsilon`, `weight_decay`;
    otherwise the method's own defaults hold, as they do in transformers, which passes none of these
    to GaLore. A method that needs the run's length gets `max_steps`.

    Args:
        arguments: a `transformers.TrainingArguments`, or anything with these fields.
        model: the model, which `build` may change.
        name: one of `available()`, for methods that transformers has no name for; `optim` must then
            be left at its default, or name the same method.
        **options: of `build`, in addition; they win over `arguments`.

    Returns:
        The optimizer, for the Trainer's `optimizers`.

    Raises:
        ValueError: `optim` names no method of this package, or an updating by layers; `optim_args`
            is malformed or has an unknown option; a field has a value that the method has no option
            for.
    """
    method = _method(arguments, name)
    made = {**_from_fields(arguments, method), **_parsed(getattr(arguments, "optim_args", None))}
    targets = getattr(arguments, "optim_target_modules", None)
    if targets is not None:
        made["patterns"] = targets
    if accepts(method, "total_steps") and getattr(arguments, "max_steps", -1) > 0:
        made.setdefault("total_steps", arguments.max_steps)
    made.update(options)
    lr = made.pop("lr", arguments.learning_rate)
    return build(method, model, lr=lr, **made)


def _method(arguments: Any, name: str | None) -> str:
    """The method's name; raises `ValueError` as `optimizer_from_arguments`."""
    said = str(getattr(arguments.optim, "value", arguments.optim))
    if said.endswith(_LAYERWISE):
        raise ValueError(
            f"optim={said!r}: accepted is optim={said.removesuffix(_LAYERWISE)!r} with "
            "max_grad_norm=0, and update_in_backward(optimizer, accumulation, max_norm) for the "
            "optimizer that this returns"
        )
    method = _NAMES.get(said, said)
    if name is None:
        if method not in available():
            raise checks.unknown_name("optim", said, [*available(), *_NAMES])
        return method
    if name not in available():
        raise checks.unknown_name("optimizer", name, available())
    if said not in _UNSAID and method != name:
        raise ValueError(
            f"optim={said!r} with name={name!r}: accepted is one of them, or the same method twice"
        )
    return name


def _parsed(text: Any) -> dict[str, Any]:
    """Options of `optim_args`: numbers, True, False and None by their values, else strings."""
    if text is not None and not isinstance(text, str):
        raise ValueError(f"optim_args={text!r}: accepted is a string like 'rank=128, scale=0.25'")
    made: dict[str, Any] = {}
    for part in (text or "").split(","):
        if not part.strip():
            continue
        key, sign, value = (piece.strip() for piece in part.partition("="))
        if not sign or not key.isidentifier() or not value or key in made:
            raise ValueError(
                f"optim_args has {part.strip()!r}: accepted are pairs like 'rank=128, "
                "update_proj_gap=200', each option once"
            )
        if value.lower() in ("true", "false", "none"):
            value = value.capitalize()
        try:
            made[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            made[key] = value
    return made


def _from_fields(arguments: Any, method: str) -> dict[str, Any]:
    """Options by the fields that differ from transformers' defaults."""
    given = {key: getattr(arguments, key, value) for key, value in _DEFAULTS.items()}
    changed = [key for key, value in _DEFAULTS.items() if given[key] != value]
    made: dict[str, Any] = {}
    for key in changed:
        option = {"adam_epsilon": "eps", "weight_decay": "weight_decay"}.get(key, "betas")
        default = TABLE[method].optimizer.constructor.defaults().get(option)
        if default is None or (option == "eps" and not isinstance(default, float)):
            raise ValueError(
                f"{key}={given[key]!r} with {method}, which has no such option: accepted is "
                f"{_DEFAULTS[key]!r}, and the method's own options in optim_args"
            )
        if option == "betas":
            made[option] = (given["adam_beta1"], given["adam_beta2"])
        else:
            made[option] = given[key]
    return made
