"""COAP: a projection updated by the correlation of gradient and momentum.

Chen et al., "COAP: Memory-Efficient Training with Correlation-Aware Gradient Projection", CVPR 2025
(arXiv 2412.00071). At multiples of `update_interval` the basis takes one step on its loss, at every
`reproject_factor`-th of them it is re-projected by a warm-started sketch (see
`projectors.correlation`); then, with R the projection, as GaLore:

    W <- W - s_t scale P Adam(R)    (or Adam(R) P^T),    then decay

Memory per m x n matrix: min(m, n) r for P and 2 max(m, n) r for the moments. Convolutions (4-D
weights) are projected on both channel axes where `rank_ratio_cnn` is given (`projectors.tucker`).

The defaults are the released code's. Its weaknesses, with the options that avoid them: the P step
has no effect at language models' gradient scale (`normalize_gradient=True`); moments are kept when
P changes (`restore_state=True`, the same as `moments="restore"`, transports them). Differences:
Adafactor without `beta1` fails there at the first P step, here the loss omits the cosine; there the
gradients of convolutions' factors accumulate from one P step to the next; 8-bit moments are
quantised there in blocks of 4096 with the signed map for both, here in blocks of 256 with an
unsigned one for the second. As there, 4-D tensors of at most 9216 entries are not projected when
`params` is given.
"""

from __future__ import annotations

from typing import ClassVar

from torch.optim.optimizer import ParamsT

from ..engine import checks
from ..engine.keywords import Keyword
from ..engine.method import method
from ..engine.optimizer import LowRankOptimizer
from ..engine.options import Group
from ..engine.rule_families import (
    ADAFACTOR,
    ADAFACTOR_8BIT,
    ADAMW,
    TRANSFORMERS_ADAMW_8BIT,
)
from ..param_groups import SIZES, is_sized, sorted_groups

PAPER = "2412.00071"
BUILD = {"scale": 0.25}  # the papers' settings; COAP's own default is 1


class Coap(LowRankOptimizer):
    """Base of the four classes: the released code's keywords and its sorting of parameters.

    Group keys: `rank` or `rank_ratio_matrix`, `rank_ratio_cnn`, `update_interval` (another name of
    `update_proj_gap`), `reproject_factor`, `restore_state`, `scale`, `coap_lr`,
    `normalize_gradient`. A rank or ratio switches projection on; so does `proj_method` ("coap"),
    with the constructor's rank or ratios.
    """

    projection_defaults: ClassVar = {"projector": "coap", "update_proj_gap": 32, "scale": 1.0}
    aliases: ClassVar = {"update_interval": "update_proj_gap"}
    foreign_keys = ("proj_method", "restore_state")
    needs_params = False
    own_keywords = (
        Keyword(
            "grouped_params_with_proj", None, "groups, instead of `params`.", "given", before="lr"
        ),
        Keyword("proj_method", "coap", 'must be "coap".', "given", ("coap",)),
        Keyword(
            "rank",
            None,
            "of the matrices sorted out of plain `params`, or in groups that have `proj_method` "
            "but no rank or ratio.",
            "given",
        ),
        Keyword("rank_ratio_matrix", None, "min(m, n) over the rank, instead of it.", "given"),
        Keyword("rank_ratio_cnn", None, "the same of 4-D weights.", "given"),
        Keyword("restore_state", False, 'moments="restore": carried over to a new basis.', "given"),
        Keyword("update_interval", 32, "steps between changes of the basis.", "given"),
        Keyword("reproject_factor", 5, "changes of the basis between re-projections.", "given"),
        Keyword("scale", 1.0, "factor on the back-projected update."),
    )

    @classmethod
    def collect(cls, params: ParamsT | None, given: Group) -> ParamsT:
        """`params` or `grouped_params_with_proj`, sorted or completed by the rank and ratios."""
        grouped: ParamsT | None = given.pop("grouped_params_with_proj", None)
        chosen = grouped if params is None else params
        if chosen is None or (params is not None and grouped is not None):
            raise ValueError(
                "params and grouped_params_with_proj (the first and second argument): accepted is "
                "exactly one of them"
            )
        sizes = {name: given.pop(name, None) for name in SIZES}
        return sorted_groups(chosen, **sizes)

    @classmethod
    def translate(cls, options: Group, defaults: Group | None) -> Group:
        """`proj_method` as a rank, `restore_state` as `moments`, a ratio of convolutions."""
        options = dict(options)
        if "proj_method" in options:
            projection = options.pop("proj_method")
            checks.choice("proj_method", projection, ("coap",))
            if defaults is not None and not is_sized(options):
                raise ValueError(
                    f"proj_method={projection!r} in a group without a rank: accepted with one of "
                    f"{', '.join(SIZES)}, in the group or as a keyword"
                )
        if "restore_state" in options:
            restore = options.pop("restore_state")
            checks.choice("restore_state", restore, (True, False))
            wanted = "restore" if restore else "keep"
            if options.setdefault("moments", wanted) != wanted:
                raise ValueError(
                    f"restore_state={restore} with moments={options['moments']!r}: accepted is "
                    f"{wanted!r}, or one of the two"
                )
        if is_sized(options) and all(options.get(name) is None for name in SIZES[:2]):
            # A group of convolutions; the ratio of matrices switches projection on.
            options["rank_ratio_matrix"] = options["rank_ratio_cnn"]
        return options


@method(
    "coap_adamw",
    paper=PAPER,
    summary="COAP: the basis follows gradient and moment; convolutions too",
    state="m r + 2 n r",
    build=BUILD,
)
class CoapAdamW(Coap):
    """COAP with AdamW; numerically the released class with `refresh="svd"`, `stagger=False`."""

    rule = ADAMW


@method(
    "coap_adamw_8bit",
    paper=PAPER,
    summary="COAP with 8-bit moments",
    state="m r, and 2 n r bytes",
    build=BUILD,
)
class CoapAdamW8bit(Coap):
    """COAP with block-wise 8-bit Adam moments; the rule is `CoapAdamW`'s."""

    rule = TRANSFORMERS_ADAMW_8BIT


@method(
    "coap_adafactor",
    paper=PAPER,
    summary="COAP with Adafactor",
    state="m r + n + r",
    build=BUILD,
)
class CoapAdafactor(Coap):
    """COAP with Adafactor; numerically the released class with `refresh="svd"`, `stagger=False`
    and a `beta1`.
    """

    rule = ADAFACTOR.but(lr=1e-3)


@method(
    "coap_adafactor_8bit",
    paper=PAPER,
    summary="COAP with Adafactor, first moment in 8 bits",
    state="m r + n + r, and n r bytes",
    build=BUILD,
)
class CoapAdafactor8bit(CoapAdafactor):
    """COAP with Adafactor and an 8-bit first moment; `beta1` defaults to 0.9."""

    rule = ADAFACTOR_8BIT.but(lr=1e-3, beta1=0.9)
