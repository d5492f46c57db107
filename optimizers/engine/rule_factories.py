"""Update rules from a group's options, checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..rules import (
    Adafactor,
    Adafactor8bit,
    Adam,
    Adam8bit,
    CautiousFactored,
    FactoredAdam,
    FoldedAdam,
    Lion,
    Momentum,
    Muon,
    NormalisedSGD,
    RowColumnScaled,
    VectorAdam,
)
from ..rules.cautious import BITS
from ..rules.folded import FOLDS
from ..rules.muon import ADJUSTMENTS
from ..rules.normalised import AXES
from ..rules.precision import MOMENT_DTYPES
from ..rules.quantizers import quantizer
from . import checks
from .options import Group, ProjectionOptions


def _adam_options(group: Group) -> dict[str, Any]:
    checks.betas(group["betas"])
    checks.number("eps", group["eps"], low=0.0)
    return {
        "lr": group["lr"],
        "betas": tuple(group["betas"]),
        "eps": group["eps"],
        "weight_decay": group["weight_decay"],
        "capturable": group["capturable"],
        "fused": group["fused"] is not False and not group["foreach"],
        "compiled": group["compile"],
        "restarts": _restarts(group),
        "moments_dtype": _moments_dtype(group),
    }


def _moments_dtype(group: Group) -> torch.dtype | None:
    return MOMENT_DTYPES[group["moments_dtype"]]


def _check_8bit(group: Group) -> None:
    """Raises `ValueError` for options that 8-bit moments don't accept."""
    checks.integer("min_8bit_size", group["min_8bit_size"], low=0)
    if group["moments_dtype"] is not None:
        raise ValueError(
            f"moments_dtype={group['moments_dtype']!r} with moments in 8 bits: accepted is None"
        )


def _restarts(group: Group) -> bool:
    """Whether each refresh resets the moments of a projected group."""
    return ProjectionOptions.of(group) is not None and group.get("moments") == "reset"


def adam_rule(group: Group, **form: Any) -> Adam:
    """Adam from `lr`, `betas`, `eps`, `weight_decay`; `form` as in `rules.Adam`.

    Raises:
        ValueError: an option is out of range.
    """
    return Adam(**{**_adam_options(group), **form})


def vector_adam_rule(group: Group) -> VectorAdam:
    """Adam in torch's form with a step count for each row.

    Raises:
        ValueError: an option is out of range.
    """
    return VectorAdam(**_adam_options(group))


def adam8bit_rule(group: Group, **form: Any) -> Adam8bit:
    """8-bit Adam from the same options and `min_8bit_size`.

    Raises:
        ValueError: an option is out of range.
    """
    _check_8bit(group)
    return Adam8bit(
        **{**_adam_options(group), **form},
        min_8bit_size=group["min_8bit_size"],
        quantizer=quantizer(group["quantizer"]),
    )


def muon_rule(group: Group) -> Muon:
    """Muon from a group's options.

    Raises:
        ValueError: an option is out of range.
    """
    checks.number("momentum", group["momentum"], low=0.0, high=1.0, high_open=True)
    checks.integer("ns_steps", group["ns_steps"], low=1)
    checks.choice("adjust_lr", group["adjust_lr"], ADJUSTMENTS)
    names = ("lr", "momentum", "nesterov", "ns_steps", "weight_decay", "adjust_lr")
    return Muon(**{name: group[name] for name in names}, moments_dtype=_moments_dtype(group))


def lion_rule(group: Group, **form: Any) -> Lion:
    """Lion from `lr`, `betas`, `weight_decay`; `form` as in `rules.Lion`.

    Raises:
        ValueError: an option is out of range.
    """
    checks.betas(group["betas"])
    return Lion(
        lr=group["lr"],
        betas=tuple(group["betas"]),
        weight_decay=group["weight_decay"],
        capturable=group["capturable"],
        moments_dtype=_moments_dtype(group),
        **form,
    )


def momentum_rule(group: Group) -> Momentum:
    """SGD with momentum from `lr`, `momentum`, `nesterov`, `weight_decay`.

    Raises:
        ValueError: an option is out of range.
    """
    checks.number("momentum", group["momentum"], low=0.0, high=1.0, high_open=True)
    checks.choice("nesterov", group["nesterov"], (True, False))
    names = ("lr", "momentum", "nesterov", "weight_decay", "capturable")
    return Momentum(**{name: group[name] for name in names}, moments_dtype=_moments_dtype(group))


def normalised_rule(group: Group) -> NormalisedSGD:
    """SGD normalised by rows or columns, from `normalise`, `momentum`, `eps` and `lr`.

    Raises:
        ValueError: an option is out of range.
    """
    checks.choice("normalise", group["normalise"], AXES)
    checks.number("momentum", group["momentum"], low=0.0, high=1.0, high_open=True)
    checks.number("eps", group["eps"], low=0.0, low_open=True)
    names = ("lr", "momentum", "eps", "weight_decay", "capturable")
    own = {name: group[name] for name in names}
    return NormalisedSGD(**own, axis=group["normalise"], moments_dtype=_moments_dtype(group))


def row_column_rule(group: Group) -> RowColumnScaled:
    """RACS from `racs_beta`, `scale`, `limiter`, `lr` and `weight_decay`.

    Raises:
        ValueError: an option is out of range.
    """
    checks.number("racs_beta", group["racs_beta"], low=0.0, high=1.0, high_open=True)
    names = ("lr", "scale", "limiter", "weight_decay")
    return RowColumnScaled(**_limited(group, names), beta=group["racs_beta"])


def _limited(group: Group, names: Sequence[str]) -> dict[str, Any]:
    """The options of these names, with a checked `scale` and `limiter`."""
    checks.number("scale", group["scale"], low=0.0)
    if group["limiter"] is not None:
        checks.number("limiter", group["limiter"], low=1.0)
    return {name: group[name] for name in names}


#: Blocks of 2^20 entries are longer than any row.
MOST_FOLDS = 20


def folded_rule(group: Group) -> FoldedAdam:
    """Adam with folded moments, from `fold`, `fold_level`, `scale`, `residual_scale` and Adam's.

    Raises:
        ValueError: an option is out of range.
    """
    checks.choice("fold", group["fold"], FOLDS)
    checks.integer("fold_level", group["fold_level"], low=0)
    if group["fold_level"] > MOST_FOLDS:
        raise ValueError(
            f"fold_level={group['fold_level']}: accepted is an integer from 0 to {MOST_FOLDS}"
        )
    checks.number("residual_scale", group["residual_scale"], low=0.0)
    names = ("lr", "eps", "weight_decay", "fold", "scale", "residual_scale", "limiter")
    own = {**_limited(group, names), **_whole_moments(group)}
    return FoldedAdam(**own, level=int(group["fold_level"]))


def factored_rule(group: Group) -> FactoredAdam:
    """Adam with moments as low-rank factors, from `rank`, `ridge` and Adam's options.

    Raises:
        ValueError: an option is out of range.
    """
    checks.integer("rank", group["rank"], low=1)
    checks.number("ridge", group["ridge"], low=0.0, low_open=True)
    names = ("lr", "eps", "weight_decay", "rank", "ridge")
    return FactoredAdam(**{name: group[name] for name in names}, **_whole_moments(group))


def _whole_moments(group: Group) -> dict[str, Any]:
    """Checked `betas` and `eps`, and the precision of the moments."""
    checks.betas(group["betas"])
    checks.number("eps", group["eps"], low=0.0)
    return {"betas": tuple(group["betas"]), "moments_dtype": _moments_dtype(group)}


def cautious_rule(group: Group) -> CautiousFactored:
    """Cautious Adam with a factored second moment, from `momentum_bits` and Adam's options.

    Raises:
        ValueError: an option is out of range.
    """
    checks.choice("momentum_bits", group["momentum_bits"], BITS)
    checks.integer("min_quantized_size", group["min_quantized_size"], low=0)
    checks.choice("cautious", group["cautious"], (True, False))
    names = ("lr", "eps", "weight_decay", "cautious", "min_quantized_size")
    own = {name: group[name] for name in names}
    return CautiousFactored(**own, **_whole_moments(group), bits=group["momentum_bits"])


def factored_without_momentum_rule(group: Group) -> Adafactor:
    """Adafactor at the group's learning rate, from `decay_rate` and `clip_threshold`.

    Raises:
        ValueError: an option is out of range.
    """
    checks.number("clip_threshold", group["clip_threshold"], low=0.0, low_open=True)
    checks.number("decay_rate", group["decay_rate"], high=0.0)
    names = ("lr", "weight_decay", "clip_threshold", "decay_rate")
    own = {name: group[name] for name in names}
    return Adafactor(**own, scale_parameter=False, relative_step=False)


def adafactor_rule(group: Group) -> Adafactor:
    """Adafactor from a group's options.

    Raises:
        ValueError: an option is out of range or two contradict each other.
    """
    return Adafactor(**_adafactor_options(group))


def adafactor8bit_rule(group: Group) -> Adafactor8bit:
    """Adafactor with an 8-bit first moment, from the same options and `min_8bit_size`.

    Raises:
        ValueError: an option is out of range or two contradict each other.
    """
    _check_8bit(group)
    return Adafactor8bit(
        **_adafactor_options(group),
        min_8bit_size=group["min_8bit_size"],
        quantizer=quantizer(group["quantizer"]),
    )


def _adafactor_options(group: Group) -> dict[str, Any]:
    eps, lr, relative = group["eps"], group["lr"], group["relative_step"]
    if not isinstance(eps, tuple | list) or len(eps) != 2:
        raise ValueError(f"eps={eps!r}: accepted are two numbers of at least 0")
    for index, value in enumerate(eps):
        checks.number(f"eps[{index}]", value, low=0.0)
    checks.number("clip_threshold", group["clip_threshold"], low=0.0, low_open=True)
    checks.number("decay_rate", group["decay_rate"], high=0.0)
    if group["beta1"] is not None:
        checks.number("beta1", group["beta1"], low=0.0, high=1.0, high_open=True)
    if lr is None and not relative:
        raise ValueError("lr=None with relative_step=False: accepted is a learning rate")
    if lr is not None and relative:
        raise ValueError(
            f"lr={lr!r} with relative_step=True: accepted is lr=None or relative_step=False"
        )
    if group["warmup_init"] and not relative:
        raise ValueError("warmup_init=True: accepted only with relative_step=True")
    return {
        "lr": lr,
        "eps": (eps[0], eps[1]),
        "clip_threshold": group["clip_threshold"],
        "decay_rate": group["decay_rate"],
        "beta1": group["beta1"],
        "weight_decay": group["weight_decay"],
        "scale_parameter": group["scale_parameter"],
        "relative_step": relative,
        "warmup_init": group["warmup_init"],
        "restarts": _restarts(group),
        "moments_dtype": _moments_dtype(group),
    }
