"""Q-GaLore: 8-bit GaLore with lazy refreshes, a basis in four bits and weights in eight.

Zhang et al., "Q-GaLore: Quantized GaLore with INT4 Projection and Layer-Adaptive Low-Rank
Gradients" (arXiv 2407.08296). GaLore's step (`galore`) with 8-bit moments, in which

    P is read as s (q - z) from 4-bit codes               (`projectors.quantized_storage`)
    each matrix is refitted at multiples of its own gap,
    which doubles where the leading vector holds still    (`projectors.lazy`)
    W is read as s (q - z) from 8-bit codes, updated in
    fp32 and rounded stochastically with new s and z      (`weights.int8`)

Memory per m x n matrix with b-byte parameters: min(m, n) r / 2 for P's codes and 2 b for each of
its groups of 256; 2 max(m, n) r and 8 bytes a block of 256 for the moments; 4 (d + 5) for the
schedule, d being P's length; m n for the weight's codes and 2 b for each of its groups of 256.

What the released code does otherwise: it stores P's codes one a byte; clips weight groups of one
sign, where here zero belongs to each group's range; keeps bf16 weights' dense copies in bf16 while
they are updated; rounds the low-rank update to the weight's precision before projecting it back;
keeps the weight's gradient in an attribute that clipping and DDP do not see; and does not train
norms, embeddings and head when updates run layer by layer. `build` quantises the weights
(`weight_bits=None` leaves them dense); the class itself takes any parameters, INT8 or not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Unpack

from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..engine import checks
from ..engine.options import Group, ProjectionKeywords
from ..engine.projected import ProjectedAdamW8bit

_BASES = {4: "int4", 8: "int8"}


class QGaLoreAdamW8bit(ProjectedAdamW8bit):
    """Q-GaLore with 8-bit Adam; the official schedule and signs with `refresh="svd"`.

    Group keys as `GaLoreAdamW8bit`'s, and `quant`, `quant_n_bit`, `quant_group_size`,
    `cos_threshold`, `gamma_proj`, `queue_size`. All other groups get plain 8-bit AdamW.
    """

    projection_defaults: ClassVar[Mapping[str, Any]] = {"schedule": "lazy", "basis": "int4"}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        min_8bit_size: int = 4096,
        percentile_clipping: int = 100,
        block_wise: bool = True,
        is_paged: bool = False,
        quantizer: str = "native",
        quant: bool = True,
        quant_n_bit: int = 4,
        **options: Unpack[ProjectionKeywords],
    ) -> None:
        """Makes the optimizer.

        Args:
            params: parameters or groups, see `param_groups`.
            lr: as in `GaLoreAdamW8bit`.
            betas: as in `GaLoreAdamW8bit`.
            eps: as in `GaLoreAdamW8bit`.
            weight_decay: as in `GaLoreAdamW8bit`.
            min_8bit_size: as in `GaLoreAdamW8bit`.
            percentile_clipping: accepted for the official signature; no effect.
            block_wise: accepted for the official signature; no effect.
            is_paged: accepted for the official signature; no effect.
            quantizer: as in `GaLoreAdamW8bit`.
            quant: whether bases are quantised.
            quant_n_bit: bits of a quantised basis, 4 or 8.
            **options: see `ProjectionKeywords`; `basis` decides instead of `quant` where it is
                given.

        Raises:
            ValueError: an option is unknown or out of range, or a parameter can't be optimized.
            ImportError: `quantizer="bitsandbytes"` without that package.
        """
        given: dict[str, Any] = {"quant": quant, "quant_n_bit": quant_n_bit, **options}
        _choose_basis(given, quant, quant_n_bit)
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            min_8bit_size=min_8bit_size,
            quantizer=quantizer,
            **given,
        )

    @classmethod
    def group_keys(cls) -> set[str]:
        """As of other methods, and the official names of the basis's storage."""
        return {*super().group_keys(), "quant", "quant_n_bit"}

    def _rename_aliases(self, group: Group) -> None:
        super()._rename_aliases(group)
        if "quant" in group or "quant_n_bit" in group:
            basis = self.defaults["basis"]
            bits = next((bits for bits, name in _BASES.items() if name == basis), 4)
            quant = group.get("quant", basis in _BASES.values())
            _choose_basis(group, quant, group.get("quant_n_bit", bits))


def _choose_basis(options: dict[str, Any], quant: Any, quant_n_bit: Any) -> None:
    """In place: says `quant` and `quant_n_bit` as `basis`, unless that is given."""
    checks.choice("quant", quant, (True, False))
    checks.choice("quant_n_bit", quant_n_bit, _BASES)
    for name in ("quant", "quant_n_bit"):
        options.pop(name, None)
    options.setdefault("basis", _BASES[quant_n_bit] if quant else None)
    if options["basis"] not in _BASES.values():
        options.pop("quant_group_size", None)
