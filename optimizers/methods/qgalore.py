"""Q-GaLore: 8-bit GaLore with lazy refreshes, a 4-bit basis and 8-bit weights.

Zhang et al., "Q-GaLore: Quantized GaLore with INT4 Projection and Layer-Adaptive Low-Rank
Gradients" (arXiv 2407.08296). GaLore's step (`galore`) with 8-bit moments, in which

    P is read as s (q - z) from 4-bit codes               (`storage.quantized`)
    each matrix is refitted at multiples of its own gap,
    which doubles while the leading vector is stable      (`schedules.lazy`)
    W is read as s (q - z) from 8-bit codes, updated in
    fp32 and rounded stochastically with new s and z      (`weights.int8`)

Memory per m x n matrix with b-byte parameters: min(m, n) r / 2 for P's codes and 2 b for each of
its groups of 256; 2 max(m, n) r and 8 bytes a block of 256 for the moments; 4 (d + 5) for the
schedule, d being P's length; m n for the weight's codes and 2 b for each of its groups of 256.

Differences: the released code stores one code of P per byte; clips weight groups of one sign, where
here each group's range includes zero; updates dense copies of bf16 weights in bf16; rounds the
low-rank update to the weight's precision before the back-projection; stores the weight's gradient
in an attribute that clipping and DDP ignore; and does not train norms, embeddings and head when
updating layer by layer. `build` quantises the weights (`weight_bits=None` leaves them dense, 4 is
in `cuda.int4_update`); the class itself accepts any parameters, INT8 or not.
"""

from __future__ import annotations

from typing import ClassVar

from ..engine import checks
from ..engine.keywords import Keyword
from ..engine.method import Conversion, method
from ..engine.optimizer import LowRankOptimizer
from ..engine.options import Group
from ..engine.rule_families import ADAMW_8BIT

_BASES = {4: "int4", 8: "int8"}


@method(
    "qgalore_adamw_8bit",
    paper="2407.08296",
    summary="Q-GaLore: lazy refreshes, INT4 bases, INT8 weights, 8-bit moments",
    state="m r / 2 + 2 n r bytes",
    weights="m n bytes",
    conversion=Conversion.to_quantized(8),
)
class QGaLoreAdamW8bit(LowRankOptimizer):
    """Q-GaLore with 8-bit Adam; the official schedule and signs with `refresh="svd"`.

    Group keys as `GaLoreAdamW8bit`'s, and `quant`, `quant_n_bit`, `quant_group_size`,
    `cos_threshold`, `gamma_proj`, `queue_size`. All other groups get plain 8-bit AdamW.
    """

    rule = ADAMW_8BIT
    projection_defaults: ClassVar = {"schedule": "lazy", "basis": "int4"}
    own_keywords = (
        Keyword("quant", True, "whether bases are quantised; `basis` wins where given.", "given"),
        Keyword("quant_n_bit", 4, "bits of a quantised basis, 4 or 8.", "given"),
    )
    foreign_keys = ("quant", "quant_n_bit")

    @classmethod
    def translate(cls, options: Group, defaults: Group | None) -> Group:
        """`quant` and `quant_n_bit` as `basis`, unless that is given."""
        options = dict(options)
        if "quant" not in options and "quant_n_bit" not in options:
            return options
        basis = (defaults or cls.projection_defaults)["basis"]
        known = {name: bits for bits, name in _BASES.items()}
        quant = options.pop("quant", basis in known)
        bits = options.pop("quant_n_bit", known.get(basis, 4))
        checks.choice("quant", quant, (True, False))
        checks.choice("quant_n_bit", bits, _BASES)
        options.setdefault("basis", _BASES[bits] if quant else None)
        if options["basis"] not in known:
            options.pop("quant_group_size", None)
        return options
