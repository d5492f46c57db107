"""Online Subspace Descent: GaLore with a subspace updated at every step, without an SVD.

Liang et al., "Memory-Efficient LLM Training with Online Subspace Descent", NeurIPS 2024 (arXiv
2408.12857). P starts as the first gradient's leading singular vectors; then at each step, with R
and N as in `galore`:

    W <- W - lr scale P N    (or N P^T),    then decay
    P <- P - lr_P OptimizerOfP(dL/dP),    L(P) = ||P P^T Ghat - Ghat||^2,    see `projectors.online`

The moments of R are kept unchanged. Memory per m x n matrix: GaLore's, and 2 min(m, n) r for P's
AdamW (Lion: half of that, SGD: none).

The defaults are the released code's, which differ from the paper: no penalty on P^T P - I, the
paper has `orthogonality=0.1`; lr_P = lr / (lr_0 update_proj_gap) doesn't depend on the size of lr,
the paper has `online_lr=5 * lr`; weight decay 0.01 on P under AdamW (none with
`online_optimizer="sgd"`); Lion's sign is taken after the back-projection, where `scale` has no
effect (`sign="subspace"` takes it before). P's optimizer state is part of `state_dict`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from ..engine import checks
from ..engine.composition import Composition
from ..engine.geometry import PROJ_TYPES
from ..engine.keywords import Keyword
from ..engine.method import method
from ..engine.optimizer import LowRankOptimizer
from ..engine.options import Group, ProjectionOptions, check_lr
from ..engine.rule_families import ADAFACTOR, ADAMW, ADAMW_8BIT, LION
from ..engine.strategies import projection_of
from ..engine.warn import warn_user
from ..residuals import Dropped, SignedBack

PAPER = "2408.12857"
_GALORE = {"projector": "singular", "schedule": "every"}

#: Our options for the released code's values of `proj_type`.
OFFICIAL_PROJ_TYPES: dict[str, dict[str, Any]] = {
    **{
        f"continuous{suffix}": {
            "projector": "online",
            "online_optimizer": optimizer,
            "schedule": "once",
        }
        for suffix, optimizer in (
            ("", "adamw"),
            ("_sgd", "sgd"),
            ("_lion", "lion"),
            ("_adam8bit", "adam8bit"),
        )
    },
    "random": {"projector": "random", "distribution": "orthonormal", "schedule": "every"},
}


class OnlineSubspace(LowRankOptimizer):
    """Base of the four classes: the online projector and the released code's group keys.

    Further group keys: `online_optimizer` ("adamw", "sgd", "lion", "adam8bit"), `online_lr`,
    `orthogonality`. `proj_type` may be one of `OFFICIAL_PROJ_TYPES`; "std", "left", "right" and
    "full" mean GaLore as in the released code, unless the group names a `projector`. `names` (for
    the released code's logging) has no effect.
    """

    projection_defaults: ClassVar = {"projector": "online", "schedule": "once"}

    @classmethod
    def translate(cls, options: Group, defaults: Group | None) -> Group:
        """`proj_type` as projector and schedule; a group's first learning rate as `base_lr`."""
        options = dict(options)
        proj_type = options.get("proj_type")
        if proj_type in OFFICIAL_PROJ_TYPES:
            for name, value in OFFICIAL_PROJ_TYPES[proj_type].items():
                if options.setdefault(name, value) != value:
                    raise ValueError(
                        f"proj_type={proj_type!r} with {name}={options[name]!r}: accepted is "
                        f"{value!r}"
                    )
            options["proj_type"] = "std"
        elif proj_type in PROJ_TYPES and "projector" not in options:
            options = {**_GALORE, **options}
        lr = None if defaults is None else options.get("lr", defaults["lr"])
        if lr is not None:
            check_lr(lr)
            options.setdefault("base_lr", float(lr))
        return options


@method(
    "online_subspace_adamw",
    paper=PAPER,
    summary="Online Subspace Descent: the basis learns at every step, no SVD",
    state="3 m r + 2 n r",
)
class OnlineSubspaceAdamW(OnlineSubspace):
    """Online Subspace Descent with AdamW; numerically the released class with `refresh="svd"`."""

    rule = ADAMW


@method(
    "online_subspace_adamw_8bit",
    paper=PAPER,
    summary="Online Subspace Descent with 8-bit moments",
    state="3 m r, and 2 n r bytes",
)
class OnlineSubspaceAdamW8bit(OnlineSubspace):
    """Online Subspace Descent with 8-bit Adam moments; `online_optimizer` sets those of P."""

    rule = ADAMW_8BIT


@method(
    "online_subspace_adafactor",
    paper=PAPER,
    summary="Online Subspace Descent with Adafactor",
    state="3 m r + n + r",
)
class OnlineSubspaceAdafactor(OnlineSubspace):
    """Online Subspace Descent with Adafactor; keywords as `GaLoreAdafactor`'s."""

    rule = ADAFACTOR


@method(
    "online_subspace_lion",
    paper=PAPER,
    summary="Online Subspace Descent with Lion",
    state="3 m r + n r",
    spellings=("GaLoreLion",),
)
class OnlineSubspaceLion(OnlineSubspace):
    """Online Subspace Descent with Lion; weight decay acts after the update."""

    rule = LION
    own_keywords = (
        Keyword(
            "sign",
            "weight",
            'where projected matrices take it: "weight" is after the back-projection (the released '
            'code; every entry of the weight moves by lr, in all directions), "subspace" before '
            "it (the step stays in the subspace and is multiplied by `scale`).",
        ),
    )

    def compose(self, group: Group) -> Composition:
        """Lion and the group's projection."""
        checks.choice("sign", group["sign"], ("weight", "subspace"))
        projection = projection_of(group)
        late = (
            projection is not None
            and group["sign"] == "weight"
            and isinstance(projection.residual, Dropped)
        )
        if late:
            assert projection is not None
            residual = SignedBack(scale=projection.residual.scale)
            projection = replace(projection, residual=residual)
        rule = self.rule.make(group, projected=True, decay_first=False, signed=not late)
        return Composition(rule, projection)

    def _warn_of_groups(self) -> None:
        super()._warn_of_groups()
        for group in self.param_groups:
            options = ProjectionOptions.of(group)
            if (
                options is not None
                and options.scale != ProjectionOptions.scale
                and group["sign"] == "weight"
            ):
                warn_user(
                    f"{type(self).__name__}: scale={options.scale} has no effect with "
                    "sign='weight', under which every entry moves by lr; sign='subspace' "
                    "multiplies by it"
                )
                return
