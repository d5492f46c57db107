"""Full-rank baselines under the same contract: AdamW, 8-bit AdamW, Adafactor and Muon.

They ignore the projection keys (`rank`, `update_proj_gap`, ...), so that a comparison changes a
name and nothing else.
"""

from __future__ import annotations

from typing import ClassVar, Unpack

from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..engine import checks
from ..engine.composition import Composition
from ..engine.optimizer import LowRankOptimizer
from ..engine.options import CommonOptions, Group
from ..engine.projected import ProjectedAdafactor
from ..engine.rule_factories import adafactor_rule, adam8bit_rule, adam_rule, muon_rule


class AdamW(LowRankOptimizer):
    """AdamW, numerically `torch.optim.AdamW` (Loshchilov and Hutter, 2019).

    Memory: 2 m n entries in the parameter's precision.
    """

    projects: ClassVar[bool] = False
    supports_capturable: ClassVar[bool] = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        **options: Unpack[CommonOptions],
    ) -> None:
        """Makes the optimizer; arguments as in `torch.optim.AdamW`, options as in `CommonOptions`.

        Raises:
            ValueError: an option is unknown or out of range, or a parameter can't be optimized.
        """
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, options)

    def compose(self, group: Group) -> Composition:
        """Adam in torch's form."""
        return Composition(adam_rule(group))


class AdamW8bit(LowRankOptimizer):
    """AdamW with block-wise 8-bit moments (Dettmers et al., 2022).

    Memory: 2 (m n + 4 ceil(m n / 256)) bytes.
    """

    projects: ClassVar[bool] = False
    supports_capturable: ClassVar[bool] = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        min_8bit_size: int = 4096,
        quantizer: str = "native",
        **options: Unpack[CommonOptions],
    ) -> None:
        """Makes the optimizer; a tensor below `min_8bit_size` entries keeps fp32 moments.

        `quantizer` is "native" or "bitsandbytes" (needs the extra `bnb`); the states are the same.

        Raises:
            ValueError: an option is unknown or out of range, or a parameter can't be optimized.
        """
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "min_8bit_size": min_8bit_size,
            "quantizer": quantizer,
        }
        super().__init__(params, defaults, options)

    def compose(self, group: Group) -> Composition:
        """8-bit Adam in torch's form."""
        return Composition(adam8bit_rule(group))


class Adafactor(ProjectedAdafactor):
    """Adafactor, numerically transformers' (Shazeer and Stern, 2018).

    Memory: m + n fp32 entries, plus m n with `beta1`. Options are `CommonOptions` alone.
    """

    projects: ClassVar[bool] = False

    def compose(self, group: Group) -> Composition:
        """Adafactor on the whole gradient."""
        return Composition(adafactor_rule(group))


class Muon(LowRankOptimizer):
    """Muon on groups with `use_muon`, AdamW on the others (Jordan et al., 2024).

    Memory: m n entries for a matrix under Muon, 2 m n under AdamW.
    """

    projects: ClassVar[bool] = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.02,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        weight_decay: float = 0.0,
        adjust_lr: str = "original",
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        use_muon: bool = False,
        **options: Unpack[CommonOptions],
    ) -> None:
        """Makes the optimizer.

        Args:
            params: parameters or groups; only hidden matrices belong in a group with `use_muon`.
            lr: learning rate of both rules (give groups their own `lr` to part them).
            momentum: Muon's momentum.
            nesterov: Nesterov momentum.
            ns_steps: Newton-Schulz iterations, at least 1.
            weight_decay: decoupled, before the update.
            adjust_lr: "original" (sqrt(max(1, m / n))) or "match_rms_adamw"
                (0.2 sqrt(max(m, n)), so that AdamW's learning rates carry over).
            betas: AdamW's decay rates.
            eps: AdamW's eps.
            use_muon: default of the group key.
            **options: see `CommonOptions`.

        Raises:
            ValueError: an option is unknown or out of range, or a parameter can't be optimized.
        """
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "weight_decay": weight_decay,
            "adjust_lr": adjust_lr,
            "betas": betas,
            "eps": eps,
            "use_muon": use_muon,
        }
        super().__init__(params, defaults, options)

    def compose(self, group: Group) -> Composition:
        """Muon or AdamW, by the group's `use_muon`."""
        checks.choice("use_muon", group["use_muon"], (True, False))
        rule = muon_rule(group)
        return Composition(rule if group["use_muon"] else adam_rule(group))
