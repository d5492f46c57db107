"""The classes that a projecting method derives from, one for each update rule."""

from __future__ import annotations

from typing import ClassVar, Unpack

from torch import Tensor
from torch.optim.optimizer import ParamsT

from .composition import Composition
from .optimizer import LowRankOptimizer
from .options import Group, ProjectionKeywords
from .rule_factories import (
    adafactor_defaults,
    adafactor_rule,
    adam8bit_rule,
    adam_rule,
    lion_rule,
)
from .strategies import projection_of


class ProjectedAdamW(LowRankOptimizer):
    """AdamW in transformers' form, in a subspace where the group has a rank."""

    supports_capturable: ClassVar[bool] = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        no_deprecation_warning: bool = True,
        **options: Unpack[ProjectionKeywords],
    ) -> None:
        """Makes the optimizer.

        Args:
            params: parameters or groups, see `param_groups`.
            lr: learning rate, float or 0-d tensor, read at each step.
            betas: decay rates of the moments.
            eps: added to sqrt(V) before bias correction (transformers' AdamW).
            weight_decay: decoupled, after the update.
            correct_bias: False leaves the bias corrections out.
            no_deprecation_warning: accepted for the official signature; no effect.
            **options: see `ProjectionKeywords`.

        Raises:
            ValueError: an option is unknown or out of range, or a parameter can't be optimized.
        """
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "correct_bias": correct_bias,
        }
        super().__init__(params, defaults, options)

    def compose(self, group: Group) -> Composition:
        """AdamW and the group's projection."""
        rule = adam_rule(
            group, eps_corrected=False, decay_first=False, correct_bias=group["correct_bias"]
        )
        return Composition(rule, projection_of(group))


class ProjectedAdamW8bit(LowRankOptimizer):
    """AdamW with block-wise 8-bit moments, in a subspace where the group has a rank.

    The rule is bitsandbytes' Adam (eps after bias correction); the quantiser is our own unless
    `quantizer="bitsandbytes"`, so that no version of bitsandbytes is needed and matrices of any
    size train.
    """

    supports_capturable: ClassVar[bool] = True

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
        **options: Unpack[ProjectionKeywords],
    ) -> None:
        """Makes the optimizer.

        Args:
            params: parameters or groups, see `param_groups`.
            lr: learning rate, float or 0-d tensor, read at each step.
            betas: decay rates of the moments.
            eps: added to sqrt(V) after bias correction.
            weight_decay: decoupled; before the update on plain parameters (as bitsandbytes does),
                after it on projected ones (as GaLore does).
            min_8bit_size: (projected) gradients with fewer entries keep fp32 moments.
            percentile_clipping: accepted for the official signature; no effect.
            block_wise: accepted for the official signature; no effect.
            is_paged: accepted for the official signature; no effect.
            quantizer: "native" or "bitsandbytes" (needs the extra `bnb`); the states are the same.
            **options: see `ProjectionKeywords`.

        Raises:
            ValueError: an option is unknown or out of range, or a parameter can't be optimized.
            ImportError: `quantizer="bitsandbytes"` without that package.
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
        """8-bit Adam and the group's projection."""
        projection = projection_of(group)
        return Composition(adam8bit_rule(group, decay_first=projection is None), projection)


class ProjectedAdafactor(LowRankOptimizer):
    """Adafactor in transformers' form, in a subspace where the group has a rank."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor | None = None,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = None,
        weight_decay: float = 0.0,
        scale_parameter: bool = True,
        relative_step: bool | None = None,
        warmup_init: bool = False,
        **options: Unpack[ProjectionKeywords],
    ) -> None:
        """Makes the optimizer.

        Args:
            params: parameters or groups, see `param_groups`.
            lr: learning rate; None with `relative_step`.
            eps: (added to squared gradients, floor of the parameter's scale).
            clip_threshold: largest RMS of an update.
            decay_rate: exponent of the second moment's decay, at most 0.
            beta1: decay of the first moment, None or 0 for none.
            weight_decay: decoupled, before the update.
            scale_parameter: multiply lr by the parameter's RMS.
            relative_step: a time-dependent lr; None means True exactly when `lr` is None.
            warmup_init: with `relative_step`, start from 1e-6 t.
            **options: see `ProjectionKeywords`.

        Raises:
            ValueError: an option is unknown or out of range, or a parameter can't be optimized.
        """
        defaults = adafactor_defaults(
            lr,
            eps,
            clip_threshold,
            decay_rate,
            beta1,
            weight_decay,
            scale_parameter,
            relative_step,
            warmup_init,
        )
        super().__init__(params, defaults, options)

    def compose(self, group: Group) -> Composition:
        """Adafactor and the group's projection."""
        return Composition(adafactor_rule(group), projection_of(group))


class ProjectedLion(LowRankOptimizer):
    """Lion, in a subspace where the group has a rank."""

    supports_capturable: ClassVar[bool] = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        **options: Unpack[ProjectionKeywords],
    ) -> None:
        """Makes the optimizer.

        Args:
            params: parameters or groups, see `param_groups`.
            lr: learning rate, float or 0-d tensor, read at each step.
            betas: decay rates of the update and of the momentum.
            weight_decay: decoupled, before the update.
            **options: see `ProjectionKeywords`.

        Raises:
            ValueError: an option is unknown or out of range, or a parameter can't be optimized.
        """
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        super().__init__(params, defaults, options)

    def compose(self, group: Group) -> Composition:
        """Lion and the group's projection."""
        return Composition(lion_rule(group), projection_of(group))
