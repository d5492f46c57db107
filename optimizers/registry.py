"""Optimizers by name: what is available, building one for a model, and its state in bytes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from . import (
    apollo,
    baselines,
    checks,
    coap,
    fira,
    flora,
    frugal,
    galore,
    galore_plus,
    low_rank,
    online_subspace,
    qgalore,
    relora,
    sltrain,
    sst,
    subspace_muon,
    switchlora,
)
from .base import LowRankOptimizer
from .factored import FactoredAdamW
from .layers import (
    FactoredLinear,
    LowRankLinear,
    SparseLowRankLinear,
    SpectralLinear,
    SwitchedLinear,
)
from .layers.convert import meta_copy, to_factored
from .options import Group
from .param_groups import factored_groups, param_groups, plain_groups
from .weights.convert import to_int8


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

#: Group options that `build` gives to plain parameters, too.
_EVERYWHERE = ("seed", "stochastic_rounding")
_INT8 = Conversion(to_int8, ("weight_bits", "weight_group_size"))

_SPARSE = _layers(SparseLowRankLinear, "alpha", "density", "support", "init")

_TABLE = {
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
            conversion=_layers(LowRankLinear, "alpha", alpha=32.0),
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


def available() -> list[str]:
    """Names that `build` accepts, sorted."""
    return sorted(_TABLE)


def describe(name: str) -> str:
    """One line about a method.

    Raises:
        ValueError: the name is unknown.
    """
    return _method(name).summary


def option_aliases(name: str) -> dict[str, str]:
    """Other names of a method's options, as its official code has them, and ours: {alias: ours}.

    Raises:
        ValueError: the name is unknown.
    """
    return dict(_method(name).optimizer.aliases)


def accepts(name: str, option: str) -> bool:
    """Whether a method's constructor has a keyword, such as `total_steps`.

    Raises:
        ValueError: the name is unknown.
    """
    return option in _method(name).constructor_options()


def _method(name: str) -> Method:
    if name not in _TABLE:
        raise checks.unknown_name("optimizer", name, _TABLE)
    return _TABLE[name]


def _sort_options(method: Method, options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits options into the groups' and the constructor's; those of a conversion are left out."""
    constructor, groups = method.constructor_options(), method.group_options()
    conversion = method.conversion.options if method.conversion else ()
    group_options: dict[str, Any] = {}
    keywords: dict[str, Any] = {**method.defaults}
    for name, value in options.items():
        if name in conversion:
            if name in constructor:
                keywords[name] = value
            continue
        if name in (_EVERYWHERE if method.optimizer.projects else constructor):
            keywords[name] = value
        elif name in groups:
            if method.optimizer.projects or name in ("patterns", "plain_lr"):
                group_options[name] = value
        elif name in constructor:
            keywords[name] = value
        else:
            known = constructor | groups | {*conversion}
            raise checks.unknown_name(f"option of {method.name}", name, known)
    return group_options, keywords


def convert(name: str, model: nn.Module, **options: Any) -> nn.Module:
    """Changes a model's parametrisation, in place, to the one that a method trains.

    `build` does this by itself. Call it before where the model is wrapped (DDP), loaded from a
    converted model's state dict, or moved between the two. Methods without a parametrisation of
    their own, and what is converted already, leave the model as it is; `merge` undoes it. Processes
    that train together need equal models here: DDP's broadcast of INT8 weights is rounded anew.

    Args:
        name: one of `available()`.
        model: the model.
        **options: as for `build`; `qgalore_adamw_8bit` has `weight_bits` (8, or None for weights as
            they are), `weight_group_size` (256) and `patterns`.

    Returns:
        The model.

    Raises:
        ValueError: the name or an option is unknown or out of range, or no layer matches.
    """
    method = _method(name)
    _sort_options(method, options)
    if method.conversion is not None:
        taken = {*method.conversion.options, "patterns"}
        method.conversion.apply(model, **{key: options[key] for key in options if key in taken})
    return model


def build(
    name: str, model: nn.Module, lr: float | Tensor | None = None, **options: Any
) -> LowRankOptimizer:
    """Builds an optimizer for a model by name.

    Linear layers of attention and MLP are projected (see `param_groups`), everything else gets the
    method's plain rule. Defaults: rank 128 (clamped to each matrix), gap 200, scale 0.25;
    Adafactor with `relative_step` and `scale_parameter` off. A method with a parametrisation of its
    own changes the model in place first, see `convert`.

    Args:
        name: one of `available()`.
        model: the model whose parameters are trained.
        lr: learning rate; the class's default when None.
        **options: group options (`rank`, `update_proj_gap`, `scale`, `proj_type`, `refresh`,
            `patterns`, `plain_lr`, ...) and constructor keywords of the class. Baselines ignore
            projection options.

    Returns:
        A `torch.optim.Optimizer`.

    Raises:
        ValueError: the name or an option is unknown (the nearest one is named) or out of range.
    """
    method = _method(name)
    group_options, keywords = _sort_options(method, options)
    convert(name, model, **options)
    if lr is not None:
        keywords["lr"] = lr
    optimizer = method.optimizer(method.groups(model, group_options), **keywords)
    if isinstance(optimizer, FactoredAdamW):
        optimizer.attach(model)
    return optimizer


def expected_state_bytes(name: str, model: nn.Module, **options: Any) -> int:
    """Bytes of optimizer state by formula, with `build`'s defaults and options.

    The model may live on the meta device; only its shapes and dtypes are read.

    Returns:
        The integer that `state_bytes(build(name, model, **options))` measures.

    Raises:
        ValueError: as `build`.
    """
    method = _method(name)
    group_options, keywords = _sort_options(method, options)
    if method.conversion is not None and method.conversion.replaces_layers:
        model = convert(name, meta_copy(model), **options)
    groups = method.groups(model, group_options)
    # An optimizer of the same groups without their parameters knows defaults and composition.
    template = method.optimizer(
        [{**group, "params": [], "param_names": []} for group in groups], **keywords
    )
    total = 0
    for group, completed in zip(groups, template.param_groups, strict=True):
        composition = template.compose(completed)
        for param in group["params"]:
            if param.numel():
                total += composition.state_bytes(param.shape, param.element_size())
    return total
