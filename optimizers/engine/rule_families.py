"""Update rules as data: the constructor's keywords in the official order, and the rule they make.

A method names its family (`rule = ADAMW`); `but` returns one with other defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..rules import UpdateRule
from .keywords import Keyword
from .options import Group
from .plain_rules import plain_rule_of
from .rule_factories import (
    adafactor8bit_rule,
    adafactor_rule,
    adam8bit_rule,
    adam_rule,
    cautious_rule,
    factored_rule,
    factored_without_momentum_rule,
    folded_rule,
    lion_rule,
    momentum_rule,
    muon_rule,
    normalised_rule,
    row_column_rule,
)


def _unchanged(defaults: Group) -> Group:
    return defaults


@dataclass(frozen=True)
class RuleFamily:
    """An update rule and its constructor keywords.

    Attributes:
        keywords: of the constructor, in the official order.
        own: makes a group's rule, `own(group, projected=..., **form)`; see `make`.
        capturable: whether step counts may stay on the device.
        complete: sets defaults that depend on other keywords.
        build: constructor arguments that `build` sets unless they are given.
    """

    keywords: tuple[Keyword, ...]
    own: Callable[..., UpdateRule]
    capturable: bool = False
    complete: Callable[[Group], Group] = _unchanged
    build: Mapping[str, Any] = field(default_factory=dict)

    def make(self, group: Group, *, projected: bool = False, **form: Any) -> UpdateRule:
        """Makes a group's rule: the one that its `plain_rule` names, else the family's own.

        Args:
            group: with all its options.
            projected: whether the method treats the group in its own way.
            **form: overrides fields of the family's rule.

        Raises:
            ValueError: an option is out of range.
        """
        chosen = plain_rule_of(group)
        return self.own(group, projected=projected, **form) if chosen is None else chosen

    def but(self, *, capturable: bool | None = None, **defaults: Any) -> RuleFamily:
        """The family with other defaults.

        Raises:
            ValueError: it has no keyword of such a name.
        """
        unknown = defaults.keys() - {keyword.name for keyword in self.keywords}
        if unknown:
            raise ValueError(f"no keyword {min(unknown)!r} in this rule family")
        keywords = tuple(replace(k, default=defaults.get(k.name, k.default)) for k in self.keywords)
        kept = self.capturable if capturable is None else capturable
        return replace(self, keywords=keywords, capturable=kept)


def _transformers_adam(group: Group, *, projected: bool = False, **form: Any) -> UpdateRule:
    own = {"eps_corrected": False, "decay_first": False, "correct_bias": group["correct_bias"]}
    return adam_rule(group, **{**own, **form})


def _torch_adam(group: Group, *, projected: bool = False, **form: Any) -> UpdateRule:
    return adam_rule(group, **form)


def _adam8bit(group: Group, *, projected: bool = False, **form: Any) -> UpdateRule:
    # bitsandbytes decays before the update, GaLore's projected groups after it.
    return adam8bit_rule(group, **{"decay_first": not projected, **form})


def _transformers_adam8bit(group: Group, *, projected: bool = False, **form: Any) -> UpdateRule:
    own = {"eps_corrected": False, "decay_first": False, "correct_bias": group["correct_bias"]}
    return adam8bit_rule(group, **{**own, **form})


def _adafactor(group: Group, *, projected: bool = False) -> UpdateRule:
    return adafactor_rule(group)


def _adafactor8bit(group: Group, *, projected: bool = False) -> UpdateRule:
    return adafactor8bit_rule(group)


def _lion(group: Group, *, projected: bool = False, **form: Any) -> UpdateRule:
    return lion_rule(group, **form)


def _momentum(group: Group, *, projected: bool = False) -> UpdateRule:
    return momentum_rule(group)


def _muon(group: Group, *, projected: bool = False) -> UpdateRule:
    rule = muon_rule(group)
    return rule if projected else adam_rule(group)


def _cautious(group: Group, *, projected: bool = False) -> UpdateRule:
    return cautious_rule(group) if projected else factored_without_momentum_rule(group)


def _or_adam(make: Callable[[Group], UpdateRule]) -> Callable[..., UpdateRule]:
    """A maker of one rule for the groups that ask for it, and of Adam for the others."""

    def chosen(group: Group, *, projected: bool = False) -> UpdateRule:
        return make(group) if projected else adam_rule(group)

    return chosen


def _relative_step(defaults: Group) -> Group:
    """`relative_step=None` becomes `lr is None`; `beta1=0` becomes None."""
    relative = defaults["relative_step"]
    relative = defaults["lr"] is None if relative is None else relative
    return {**defaults, "relative_step": relative, "beta1": defaults["beta1"] or None}


_LR = Keyword("lr", 1e-3, "learning rate, float or 0-d tensor, read at each step.")
_BETAS = Keyword("betas", (0.9, 0.999), "decay rates of the moments.")
_CORRECT_BIAS = Keyword("correct_bias", True, "False leaves the bias corrections out.")
_NO_WARNING = Keyword(
    "no_deprecation_warning",
    True,
    "accepted for the official signature; no effect.",
    "no effect",
    (True, False),
)
_AMSGRAD = Keyword("amsgrad", False, "must be False.", "no effect", (False,))
_NO_EFFECT = "accepted for the official signature; no effect."

_8BIT = (
    Keyword("min_8bit_size", 4096, "(projected) gradients with fewer entries keep fp32 moments."),
    Keyword(
        "quantizer",
        "native",
        '"native" or "bitsandbytes" (needs the extra `bnb`); the states are the same.',
    ),
)

#: AdamW in transformers' form, used by GaLore, Fira, COAP and APOLLO.
ADAMW = RuleFamily(
    (
        _LR,
        _BETAS,
        Keyword("eps", 1e-6, "added to sqrt(V) before bias correction (transformers' AdamW)."),
        Keyword("weight_decay", 0.0, "decoupled, after the update."),
        _CORRECT_BIAS,
        _NO_WARNING,
    ),
    _transformers_adam,
    capturable=True,
)

#: AdamW in torch's form.
TORCH_ADAMW = RuleFamily(
    (
        _LR,
        _BETAS,
        Keyword("eps", 1e-8, "added to sqrt(V) after bias correction."),
        Keyword("weight_decay", 1e-2, "decoupled, before the update."),
        _AMSGRAD,
    ),
    _torch_adam,
    capturable=True,
)

#: AdamW with block-wise 8-bit moments in bitsandbytes' form.
ADAMW_8BIT = RuleFamily(
    (
        _LR,
        _BETAS,
        Keyword("eps", 1e-8, "added to sqrt(V) after bias correction."),
        Keyword(
            "weight_decay",
            1e-2,
            "decoupled; before the update on plain parameters (as bitsandbytes), after it on "
            "projected ones (as GaLore).",
        ),
        _AMSGRAD,
        Keyword(
            "optim_bits",
            32,
            "accepted for the official signature; moments have 8 bits.",
            "no effect",
            (8, 32),
        ),
        Keyword("args", None, _NO_EFFECT, "no effect"),
        _8BIT[0],
        Keyword("percentile_clipping", 100, _NO_EFFECT, "no effect"),
        Keyword("block_wise", True, _NO_EFFECT, "no effect"),
        Keyword("is_paged", False, _NO_EFFECT, "no effect"),
        _8BIT[1],
    ),
    _adam8bit,
    capturable=True,
)

#: The same in transformers' form, used by COAP.
TRANSFORMERS_ADAMW_8BIT = RuleFamily(
    (*ADAMW.keywords, *_8BIT, _AMSGRAD), _transformers_adam8bit, capturable=True
)

#: Adafactor in transformers' form.
ADAFACTOR = RuleFamily(
    (
        Keyword("lr", None, "learning rate; None with `relative_step`."),
        Keyword("eps", (1e-30, 1e-3), "(added to squared gradients, floor of the weight's scale)."),
        Keyword("clip_threshold", 1.0, "largest RMS of an update."),
        Keyword("decay_rate", -0.8, "exponent of the second moment's decay, at most 0."),
        Keyword("beta1", None, "decay of the first moment, None or 0 for none."),
        Keyword("weight_decay", 0.0, "decoupled, before the update."),
        Keyword("scale_parameter", True, "multiply lr by the weight's RMS."),
        Keyword(
            "relative_step",
            None,
            "a time-dependent lr; None is True exactly where `lr` is None.",
        ),
        Keyword("warmup_init", False, "with `relative_step`, start from 1e-6 t."),
    ),
    _adafactor,
    complete=_relative_step,
    build={"relative_step": False, "scale_parameter": False, "lr": 1e-3},
)

#: Adafactor with an 8-bit first moment.
ADAFACTOR_8BIT = replace(ADAFACTOR, keywords=(*ADAFACTOR.keywords, *_8BIT), own=_adafactor8bit)

LION = RuleFamily(
    (
        Keyword("lr", 1e-4, _LR.doc),
        Keyword("betas", (0.9, 0.99), "decay rates of the update and of the momentum."),
        Keyword("weight_decay", 0.0, "decoupled, before the update."),
    ),
    _lion,
    capturable=True,
)

#: SGD with momentum.
SGD = RuleFamily(
    (
        _LR,
        Keyword("momentum", 0.9, "decay of the momentum, 0 for none."),
        Keyword("weight_decay", 0.0, "decoupled, before the update."),
        Keyword("nesterov", False, "look ahead by one momentum step."),
    ),
    _momentum,
    capturable=True,
)

#: Muon where a group is projected, torch's AdamW elsewhere.
MUON = RuleFamily(
    (
        Keyword("lr", 0.02, "learning rate of both rules; groups may have their own."),
        Keyword(
            "momentum",
            0.95,
            "Muon's momentum. OneCycleLR and CyclicLR cycle `betas` where a group has both: give "
            "them cycle_momentum=False, or set it yourself.",
        ),
        Keyword("nesterov", True, "Nesterov momentum."),
        Keyword("ns_steps", 5, "Newton-Schulz iterations, at least 1."),
        Keyword("weight_decay", 0.0, "decoupled, before the update."),
        Keyword(
            "adjust_lr",
            "original",
            '"original" (sqrt(max(1, m / n))) or "match_rms_adamw" (0.2 sqrt(max(m, n)), so that '
            "AdamW's learning rates carry over), by the (projected) gradient's shape.",
        ),
        Keyword("betas", (0.9, 0.95), "AdamW's decay rates."),
        Keyword("eps", 1e-8, "AdamW's eps."),
    ),
    _muon,
    build={"adjust_lr": "match_rms_adamw", "lr": 1e-3},
)

#: SGD normalised by rows or columns where a group says so, torch's AdamW elsewhere.
SCALE = RuleFamily(
    (
        _LR,
        Keyword("momentum", 0.9, "decay of the momentum of normalised groups, 0 for none."),
        _BETAS,
        Keyword("eps", 1e-8, "added to root mean squares, and AdamW's eps; above 0."),
        Keyword("weight_decay", 0.0, "decoupled, before the update."),
    ),
    _or_adam(normalised_rule),
    capturable=True,
)

_TORCH_ADAM = (
    Keyword("eps", 1e-8, "added to sqrt(V) after bias correction."),
    Keyword("weight_decay", 0.0, "decoupled, before the update."),
)
_LIMITER = Keyword(
    "limiter", 1.01, "largest growth of an update's norm in one step, at least 1; None for none."
)

#: RACS where a group says so, torch's AdamW elsewhere.
RACS = RuleFamily(
    (
        _LR,
        Keyword("racs_beta", 0.9, "decay of the factors by row and column."),
        Keyword("scale", 0.05, "factor on RACS's updates."),
        _LIMITER,
        Keyword("betas", (0.9, 0.999), "AdamW's decay rates."),
        Keyword("eps", 1e-8, "AdamW's eps."),
        _TORCH_ADAM[1],
    ),
    _or_adam(row_column_rule),
)

#: Adam with folded moments where a group says so, torch's AdamW elsewhere.
FOAM = RuleFamily(
    (
        _LR,
        Keyword("betas", (0.9, 0.95), "decay rates of the moments."),
        *_TORCH_ADAM,
        Keyword("fold", "mean", '"mean" (FOAM) or "haar" (GWT).'),
        Keyword("fold_level", 2, "blocks have 2^level entries: Adam's state, divided by as many."),
        Keyword("scale", 0.25, "factor on folded updates."),
        Keyword("residual_scale", 1.0, "factor on what the fold loses of a gradient."),
        replace(_LIMITER, doc=f"with fold='haar', {_LIMITER.doc}"),
    ),
    _or_adam(folded_rule),
)

#: Adam with moments as low-rank factors where a group says so, torch's AdamW elsewhere.
LORA_PRE = RuleFamily(
    (
        _LR,
        Keyword("betas", (0.9, 0.95), "decay rates of the moments."),
        *_TORCH_ADAM,
        Keyword("ridge", 1e-5, "added to Gram matrices, relative to their diagonal; above 0."),
    ),
    _or_adam(factored_rule),
)

#: Cautious Adam with factored second moments where a group has momentum, Adafactor elsewhere.
CAUTIOUS = RuleFamily(
    (
        _LR,
        Keyword("betas", (0.9, 0.99), "decay rates of momentum and second moment."),
        *_TORCH_ADAM,
        Keyword(
            "momentum_bits",
            4,
            "bits of the stored momentum: 4, 8 or 32 (`moments_dtype`); None for no momentum, "
            "which is Adafactor.",
        ),
        Keyword("cautious", True, "entries whose momentum disagrees with the gradient rest."),
        Keyword("min_quantized_size", 4096, "smaller matrices have a momentum in 32 bits."),
        Keyword("decay_rate", -0.8, "without momentum: of Adafactor's second moment, at most 0."),
        Keyword("clip_threshold", 1.0, "without momentum: largest RMS of Adafactor's update."),
    ),
    _cautious,
)
