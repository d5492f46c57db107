"""SLTrain: weights that are low-rank plus sparse, with no dense weight anywhere.

Han et al., "SLTrain: a sparse plus low-rank approach for parameter and memory efficient
pretraining" (arXiv 2406.02214). Each matched layer is W = c B A + S with c = alpha / r and S of a
fixed random support (`layers.sparse_low_rank`); A, B and the values of S are trained by AdamW, or
AdamW with 8-bit moments. `refactor_gap` as in `low_rank`.

Memory per m x n matrix with b-byte parameters and density d: b (r (m + n) + d m n) for weights,
twice that for moments (2 bytes an entry and 8 a block of 256 with 8-bit moments), nothing for the
support, or 4 d m n with `support="stored"`.
"""

from __future__ import annotations

from typing import Any, ClassVar, Unpack

from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..engine.options import CommonOptions, Group
from ..engine.rule_factories import adam8bit_rule
from ..layers import FactoredLinear
from ..layers.sparse_low_rank import SparseLowRankLinear
from ..rules import UpdateRule
from .low_rank import LowRankAdamW


class SLTrainAdamW(LowRankAdamW):
    """SLTrain with AdamW; all other parameters get plain AdamW."""

    layer_type: ClassVar[type[FactoredLinear]] = SparseLowRankLinear


class SLTrainAdamW8bit(SLTrainAdamW):
    """SLTrain with block-wise 8-bit moments; all other parameters get plain 8-bit AdamW."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        min_8bit_size: int = 4096,
        quantizer: str = "native",
        refactor_gap: int | None = None,
        **options: Unpack[CommonOptions],
    ) -> None:
        """Makes the optimizer; a tensor below `min_8bit_size` entries keeps fp32 moments.

        `quantizer` as in `AdamW8bit`, everything else as in `SLTrainAdamW`.

        Raises:
            ValueError: an option is unknown or out of range, or a parameter can't be optimized.
            ImportError: `quantizer="bitsandbytes"` without that package.
        """
        own: dict[str, Any] = {"min_8bit_size": min_8bit_size, "quantizer": quantizer}
        super().__init__(params, lr, betas, eps, weight_decay, refactor_gap, own, **options)

    def factor_rule(self, group: Group) -> UpdateRule:
        """8-bit Adam whose bias corrections start anew at each refactorisation."""
        return adam8bit_rule(group, restarts=True)

    def plain_rule(self, group: Group) -> UpdateRule:
        """8-bit Adam in torch's form."""
        return adam8bit_rule(group)
