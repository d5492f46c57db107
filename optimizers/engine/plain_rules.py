"""The rule that a group has in place of its method's own: `plain_rule` in a group.

Methods differ in what they give to embeddings, head and norms, which are most of a small model, so
methods that are compared should give these the same rule.
"""

from __future__ import annotations

from ..rules import UpdateRule
from . import checks
from .options import Group, ProjectionOptions
from .rule_factories import adam8bit_rule, adam_rule, factored_without_momentum_rule

#: What the group key `plain_rule` may be; None is the method's own as well.
PLAIN_RULES = ("own", "adamw", "adamw_8bit", "adafactor")
_ADAM_BETAS, _ADAM_EPS = (0.9, 0.999), 1e-8
_EIGHT_BIT = {"min_8bit_size": 4096, "quantizer": "native"}
_ADAFACTOR = {"clip_threshold": 1.0, "decay_rate": -0.8}


def plain_rule_of(group: Group) -> UpdateRule | None:
    """The rule that a group's `plain_rule` names; None for the method's own.

    AdamW is torch's, with the group's `betas` where it has some, else (0.9, 0.999), and eps 1e-8;
    "adamw_8bit" is the same with block-wise moments of 8 bits, whatever `moments_dtype` says of the
    method's own (`min_8bit_size` and `quantizer` are the group's, where the method has them).
    Adafactor (Shazeer and Stern, 2018) has no momentum and takes the group's `lr` as it is.

    Args:
        group: with all its options; `lr` and `weight_decay` are the rule's as well.

    Raises:
        ValueError: the name is unknown, the group is projected or of factors, or Adafactor is to be
            captured in a CUDA graph.
    """
    name = group.get("plain_rule")
    checks.choice("plain_rule", name, (None, *PLAIN_RULES))
    if name in (None, "own"):
        return None
    if group.get("factors") or ProjectionOptions.of(group) is not None:
        raise ValueError(
            f"plain_rule={name!r} in a group that is projected or of factors: accepted in groups "
            "of embeddings, head, norms, biases, as build(name, model, plain_rule=...) makes them"
        )
    adam = {**group, "betas": group.get("betas", _ADAM_BETAS), "eps": _ADAM_EPS}
    if name == "adamw":
        return adam_rule(adam)
    if name == "adamw_8bit":
        return adam8bit_rule({**_EIGHT_BIT, **adam, "moments_dtype": None})
    if group["capturable"]:
        raise ValueError(f"capturable=True with plain_rule={name!r}: accepted is False")
    return factored_without_momentum_rule({**_ADAFACTOR, **group})
