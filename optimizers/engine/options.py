"""Options of groups and constructors: names, defaults and checks, as plain scalars.

Everything here is stored in `param_groups`, so it is saved with `state_dict` and may differ from
group to group.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ..projectors import REFRESH_MODES
from ..rules import MOMENT_TRANSPORTS
from ..rules.precision import MOMENT_DTYPES
from . import checks
from .geometry import PROJ_TYPES

Group = dict[str, Any]

#: Low precisions of the projection GEMMs, by the name stored in a group.
PROJECTION_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


#: Options of every optimizer, as keywords or group keys; `keywords.DOCS` describes them.
COMMON_DEFAULTS: dict[str, Any] = {
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "compile": False,
    "skip_nonfinite": True,
    "moments_dtype": None,
    "stochastic_rounding": False,
}


#: Further options of the projecting optimizers, and groups'; a strategy's own options
#: (`strategies.strategy_option_owners` lists them) are keywords too.
PROJECTION_DEFAULTS: dict[str, Any] = {
    "projector": "singular",
    "refresh": None,
    "schedule": "every",
    "stagger": None,
    "basis": None,
    "residual": "dropped",
    "moments": "keep",
    "projection_dtype": None,
    "seed": 0,
}


@dataclass(frozen=True)
class ProjectionOptions:
    """How a group's matrices are projected; a rank in a group switches projection on.

    Attributes:
        rank: r, at least 1; clamped to min(m, n) of each matrix.
        rank_ratio_matrix: r = min(m, n) // ratio, at least 1, instead of `rank` (COAP).
        update_proj_gap: steps between refreshes of the subspace.
        scale: factor on the back-projected update (GaLore's alpha).
        proj_type: which axis is projected: "std" (the shorter), "reverse_std", "left", "right" or
            "full" (both).
        projector: which subspace.
        refresh: how singular vectors are computed; None until `decide_by_device`.
        schedule: when a matrix is refitted.
        stagger: spread refreshes over the steps of a gap; None as above.
        basis: how bases are stored.
        residual: how the gradient outside the subspace is used.
        moments: how moments follow a change of the subspace.
        projection_dtype: precision of the projection GEMMs, None for the weights'.
        stochastic_rounding: of bf16 weights.
        seed: of everything random.
    """

    rank: int | None = None
    rank_ratio_matrix: float | None = None
    update_proj_gap: int = 200
    scale: float = 0.25
    proj_type: str = "std"
    projector: str = "singular"
    refresh: str | None = "eigh"
    schedule: str = "every"
    stagger: bool | None = False
    basis: str | None = None
    residual: str = "dropped"
    moments: str = "keep"
    projection_dtype: str | None = None
    stochastic_rounding: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank is not None:
            checks.integer("rank", self.rank, low=1)
        if self.rank_ratio_matrix is not None:
            checks.number("rank_ratio_matrix", self.rank_ratio_matrix, low=1.0)
        checks.integer("update_proj_gap", self.update_proj_gap, low=1)
        checks.number("scale", self.scale, low=0.0)
        checks.choice("proj_type", self.proj_type, PROJ_TYPES)
        checks.choice("refresh", self.refresh, (None, *REFRESH_MODES))
        checks.choice("stagger", self.stagger, (None, True, False))
        checks.choice("moments", self.moments, MOMENT_TRANSPORTS)
        checks.choice("projection_dtype", self.projection_dtype, (None, *PROJECTION_DTYPES))
        checks.choice("stochastic_rounding", self.stochastic_rounding, (True, False))
        checks.integer("seed", self.seed, low=0)

    def rank_of(self, shape: Sequence[int]) -> int:
        """The rank of a matrix of this shape, at most its shorter side."""
        short = min(shape)
        if self.rank_ratio_matrix is not None:
            return max(int(short // self.rank_ratio_matrix), 1)
        assert self.rank is not None
        return min(self.rank, short)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """All option names."""
        return tuple(field.name for field in fields(cls))

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> ProjectionOptions | None:
        """The group's options, or None if it has no rank.

        Raises:
            ValueError: an option is out of range.
        """
        if group.get("rank") is None and group.get("rank_ratio_matrix") is None:
            return None
        return cls(**{name: group[name] for name in cls.names() if name in group})

    @property
    def dtype(self) -> torch.dtype | None:
        """`projection_dtype` as a dtype."""
        return PROJECTION_DTYPES[self.projection_dtype] if self.projection_dtype else None


#: Least gap between refreshes that are spread over it by default on a GPU.
STAGGERED_GAP = 50


def decide_by_device(group: Group) -> None:
    """In place: `refresh` and `stagger`, where they are None, by where the parameters are.

    On CUDA an exact decomposition of all matrices in one step stalls training for seconds to
    minutes: there bases are "randomized", and refreshes with a gap of `STAGGERED_GAP` or more are
    staggered. Elsewhere they are exact ("eigh") and all at once. From then on the values are the
    group's, as if they had been given: they are saved with it, and stay when it is moved, or loaded
    where the defaults are others.

    Args:
        group: its options have been checked.
    """
    on_cuda = any(isinstance(p, Tensor) and p.device.type == "cuda" for p in group["params"])
    if "refresh" in group and group["refresh"] is None:
        group["refresh"] = "randomized" if on_cuda else "eigh"
    if "stagger" in group and group["stagger"] is None:
        gap = group.get("update_proj_gap", ProjectionOptions.update_proj_gap)
        group["stagger"] = on_cuda and gap >= STAGGERED_GAP


#: Names of options of any method or of `build`, which registration fills: in a group of a method
#: without it, such a name is a mistake, where others are the user's own.
OF_SOME_METHOD: set[str] = set()

#: Keys of a group that are not options: parameters, and rates that a scheduler may change.
NO_OPTIONS = ("params", "param_names", "lr", "initial_lr")

#: Rates that `build` has for what is not projected, of all of it and of parts.
OWN_RATES = ("plain_lr", "embedding_lr", "head_lr")

#: Options by which `build` makes the groups of any method, baselines included.
OF_BUILD = ("patterns", "plain_rule", *OWN_RATES)

#: Names of rates, which may be tensors: captured steps read them anew.
RATES = ("lr", "initial_lr", *OWN_RATES)


def make_plain(options: MutableMapping[str, Any], known: Collection[str] | None = None) -> None:
    """In place: converts NumPy numbers, and tensors whose name is in `known`, to Python numbers.

    A learning rate may remain a tensor. Groups are saved, and a file that contains NumPy numbers
    does not load under `weights_only`.
    """
    for name, value in options.items():
        if name in ("params", "param_names"):
            continue
        if isinstance(value, Tensor) and (
            name in RATES or (known is not None and name not in known)
        ):
            continue
        made = checks.plain(value)
        if made is not value:
            options[name] = made


def check_lr(lr: Any, name: str = "lr") -> None:
    """Raises `ValueError` unless a rate is a number >= 0 or a tensor with one such entry."""
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(
                f"{name} is a tensor of shape {tuple(lr.shape)}: accepted is one entry"
            )
        if lr.device.type != "cpu":
            return  # reading it would synchronise
        lr = lr.item()
    checks.number(name, lr, low=0.0, high=math.inf)


def check_common(group: Mapping[str, Any]) -> None:
    """Raises `ValueError` for values of common options that are not accepted."""
    for name in ("maximize", "capturable", "compile", "skip_nonfinite", "stochastic_rounding"):
        checks.choice(name, group[name], (True, False))
    checks.choice("moments_dtype", group["moments_dtype"], MOMENT_DTYPES)
    for name in ("foreach", "fused"):
        checks.choice(name, group[name], (None, True, False))
    if group["differentiable"]:
        raise ValueError("differentiable=True: accepted is False; step() is not differentiable")
    if group["foreach"] and group["fused"]:
        raise ValueError("foreach=True with fused=True: accepted is one of them")


def check_capturable(groups: Iterable[Mapping[str, Any]]) -> None:
    """Raises `ValueError` for groups that can't be captured in a CUDA graph."""
    for index, group in enumerate(groups):
        if not group.get("capturable", False):
            raise ValueError(
                f"a step of group {index} with capturable=False while a CUDA graph is captured: "
                "accepted is capturable=True; replays would repeat this step's number"
            )
