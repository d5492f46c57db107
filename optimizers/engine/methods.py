"""The table of methods: which class, groups, defaults and change of the model a name stands for."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from ..layers import (
    FactoredLinear,
    LowRankLinear,
    QuantizedLowRankLinear,
    SparseLowRankLinear,
    SpectralLinear,
    SwitchedLinear,
)
from ..layers.convert import to_factored
from ..methods import (
    apollo,
    baselines,
    coap,
    fira,
    flora,
    frugal,
    galore,
    galore_plus,
    loqt,
    low_rank,
    online_subspace,
    qgalore,
    relora,
    sltrain,
    sst,
    switchlora,
)
from ..methods import galore_muon as subspace_muon
from ..param_groups import factored_groups, param_groups, plain_groups
from ..weights.convert import to_int8
from .optimizer import LowRankOptimizer
from .options import Group


@dataclass(frozen=True)
class Conversion:
    """A change of a model's parametrisation, in place; what is converted already stays.

    Attributes:
        apply: changes the model; takes `patterns` and the options.
        options: names of its own options.
        replaces_layers: other parameters are trained afterwards.
    """

    apply: Callable[..., None]
    options: tuple[str, ...]
    replaces_layers: bool = False


@dataclass(frozen=True)
class Method:
    """One row of the table of optimizers.

    Attributes:
        name: snake-case name.
        optimizer: its class.
        summary: one line for people.
        groups: makes parameter groups from a model and the group options.
        defaults: constructor arguments that `build` sets unless they are given.
        conversion: how the method changes a model before, if it does.
    """

    name: str
    optimizer: type[LowRankOptimizer]
    summary: str
    groups: Callable[[nn.Module, dict[str, Any]], list[Group]]
    defaults: dict[str, Any] = field(default_factory=dict)
    conversion: Conversion | None = None

    def constructor_options(self) -> set[str]:
        """Names of the constructor's keywords."""
        found = self.optimizer.keywords()
        for base in self.optimizer.__mro__:
            if base is LowRankOptimizer:
                break
            if "__init__" in vars(base):
                parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
                wanted = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
                found |= {p.name for p in parameters if p.kind in wanted}
        return found - {"self", "params", "grouped_params_with_proj"}

    def group_options(self) -> set[str]:
        """Names of the options of the groups that `build` makes; baselines ignore most of them."""
        return {*self.optimizer.group_keys(), "patterns", "plain_lr"}


def _projected(model: nn.Module, options: dict[str, Any]) -> list[Group]:
    return param_groups(model, **options)


def _plain(model: nn.Module, options: dict[str, Any]) -> list[Group]:
    return plain_groups(model, **options)


def _factored(model: nn.Module, options: dict[str, Any]) -> list[Group]:
    own = {name: value for name, value in options.items() if name != "patterns"}
    return factored_groups(model, **own)


def _layers(kind: type[FactoredLinear], *options: str, **fixed: Any) -> Conversion:
    """A conversion to layers of `kind`, whose options have the given defaults."""
    names = ("rank", "seed", *options)
    return Conversion(partial(to_factored, kind=kind, **fixed), names, replaces_layers=True)


def _muon(model: nn.Module, options: dict[str, Any]) -> list[Group]:
    hidden, *others = plain_groups(model, **options, apart=True)
    return [{**hidden, "use_muon": True}, *({**group, "use_muon": False} for group in others)]


def _cross_head(model: nn.Module, options: dict[str, Any]) -> list[Group]:
    return galore_plus.cross_head_groups(model, **options)


def _rank_one(model: nn.Module, options: dict[str, Any]) -> list[Group]:
    return param_groups(model, **{"rank": 1, **options})


_NO_RELATIVE = {"relative_step": False, "scale_parameter": False, "lr": 1e-3}

_FACTORED = {**_NO_RELATIVE, "scale": 0.25}  # COAP's own scale is 1

_INT8 = Conversion(to_int8, ("weight_bits", "weight_group_size"))

_SPARSE = _layers(SparseLowRankLinear, "alpha", "density", "support", "init")

TABLE = {
    method.name: method
    for method in (
        Method("adafactor", baselines.Adafactor, "Adafactor, full rank", _plain, _NO_RELATIVE),
        Method("adamw", baselines.AdamW, "AdamW, full rank", _plain),
        Method("adamw_8bit", baselines.AdamW8bit, "AdamW with 8-bit moments, full rank", _plain),
        Method("apollo_adamw", apollo.ApolloAdamW, "APOLLO (arXiv 2412.05270)", _projected),
        Method(
            "apollo_mini_adamw",
            apollo.ApolloMiniAdamW,
            "APOLLO-Mini, rank 1 by default (arXiv 2412.05270)",
            _rank_one,
        ),
        Method(
            "coap_adafactor",
            coap.CoapAdafactor,
            "COAP with Adafactor (arXiv 2412.00071)",
            _projected,
            _FACTORED,
        ),
        Method(
            "coap_adafactor_8bit",
            coap.CoapAdafactor8bit,
            "COAP with Adafactor, first moment in 8 bits (arXiv 2412.00071)",
            _projected,
            _FACTORED,
        ),
        Method(
            "coap_adamw", coap.CoapAdamW, "COAP (arXiv 2412.00071)", _projected, {"scale": 0.25}
        ),
        Method(
            "coap_adamw_8bit",
            coap.CoapAdamW8bit,
            "COAP with 8-bit moments (arXiv 2412.00071)",
            _projected,
            {"scale": 0.25},
        ),
        Method("fira_adamw", fira.FiraAdamW, "Fira (arXiv 2410.01623)", _projected),
        Method(
            "flora_adafactor",
            flora.FloraAdafactor,
            "Flora (arXiv 2402.03293)",
            _projected,
            _NO_RELATIVE,
        ),
        Method("frugal_adamw", frugal.FrugalAdamW, "FRUGAL (arXiv 2411.07837)", _projected),
        Method(
            "galore_adafactor",
            galore.GaLoreAdafactor,
            "GaLore with Adafactor (arXiv 2403.03507)",
            _projected,
            _NO_RELATIVE,
        ),
        Method("galore_adamw", galore.GaLoreAdamW, "GaLore (arXiv 2403.03507)", _projected),
        Method(
            "galore_adamw_8bit",
            galore.GaLoreAdamW8bit,
            "GaLore with 8-bit moments (arXiv 2403.03507)",
            _projected,
        ),
        Method(
            "galore_plus_adamw",
            galore_plus.GaLorePlusAdamW,
            "GaLore+: attention heads share a basis (arXiv 2412.19820)",
            _cross_head,
        ),
        Method(
            "galore_muon",
            subspace_muon.GaLoreMuon,
            "Muon in GaLore's subspace, AdamW elsewhere",
            _projected,
            {"adjust_lr": "match_rms_adamw", "lr": 1e-3},
        ),
        Method(
            "online_subspace_adafactor",
            online_subspace.OnlineSubspaceAdafactor,
            "Online Subspace Descent with Adafactor (arXiv 2408.12857)",
            _projected,
            _NO_RELATIVE,
        ),
        Method(
            "online_subspace_adamw",
            online_subspace.OnlineSubspaceAdamW,
            "Online Subspace Descent (arXiv 2408.12857)",
            _projected,
        ),
        Method(
            "online_subspace_adamw_8bit",
            online_subspace.OnlineSubspaceAdamW8bit,
            "Online Subspace Descent with 8-bit moments (arXiv 2408.12857)",
            _projected,
        ),
        Method(
            "online_subspace_lion",
            online_subspace.OnlineSubspaceLion,
            "Online Subspace Descent with Lion (arXiv 2408.12857)",
            _projected,
        ),
        Method(
            "qgalore_adamw_8bit",
            qgalore.QGaLoreAdamW8bit,
            "Q-GaLore: lazy refreshes, INT4 bases, INT8 weights (arXiv 2407.08296)",
            _projected,
            conversion=_INT8,
        ),
        Method(
            "loqt_adamw",
            loqt.LoQTAdamW,
            "LoQT: a factor beside an NF4 weight, on a basis of its gradient (arXiv 2405.16528)",
            _factored,
            conversion=_layers(QuantizedLowRankLinear, "scale", "weight_format", "basis_format"),
        ),
        Method(
            "low_rank_adamw",
            low_rank.LowRankAdamW,
            "plain low-rank factors, the baseline of the reparametrised methods",
            _factored,
            conversion=_layers(LowRankLinear, "alpha", alpha=32.0, keep_frozen=False),
        ),
        Method(
            "relora_adamw",
            relora.ReLoRAAdamW,
            "ReLoRA: low-rank factors merged into a frozen weight (arXiv 2307.05695)",
            _factored,
            conversion=_layers(LowRankLinear, "alpha", "heads", alpha=32.0),
        ),
        Method(
            "sltrain_adamw",
            sltrain.SLTrainAdamW,
            "SLTrain: low-rank plus sparse weights (arXiv 2406.02214)",
            _factored,
            conversion=_SPARSE,
        ),
        Method(
            "sltrain_adamw_8bit",
            sltrain.SLTrainAdamW8bit,
            "SLTrain with 8-bit moments (arXiv 2406.02214)",
            _factored,
            conversion=_SPARSE,
        ),
        Method(
            "sst_adamw",
            sst.SSTAdamW,
            "SST: singular values, and a few singular vectors in turns (arXiv 2405.15481)",
            _factored,
            conversion=_layers(SpectralLinear, "enhanced"),
        ),
        Method(
            "switchlora_adamw",
            switchlora.SwitchLoRAAdamW,
            "SwitchLoRA: low-rank factors that trade vectors with candidates (arXiv 2406.06564)",
            _factored,
            conversion=_layers(SwitchedLinear, "offload"),
        ),
        Method(
            "muon",
            baselines.Muon,
            "Muon on hidden matrices, AdamW elsewhere",
            _muon,
            {"adjust_lr": "match_rms_adamw", "lr": 1e-3},
        ),
    )
}
