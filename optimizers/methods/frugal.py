"""FRUGAL: Adam in a subspace that is redrawn at intervals, signSGD outside it.

Zmushko et al., "FRUGAL: Memory-Efficient Optimization by Reducing State Overhead for Scalable
Training" (arXiv 2411.07837). With R the projected gradient and N = Adam(R) in torch's form:

    W <- (1 - lr wd) W - lr scale (P N + inactive_lr_scale sign(G - P R))

(N P^T and R P^T on the right). Every `update_proj_gap` steps a new subspace is chosen and the
moments and their bias correction are reset. By default it consists of random coordinates (rows or
columns of the shorter axis);
`projector="singular"` takes leading singular vectors, `projector="random"` with
`distribution="orthonormal"` random directions. `density` is the subspace's share: r = density
min(m, n).

Memory per m x n matrix: 2 density m n for the moments, and 4 r bytes for coordinates or
min(m, n) r entries for a basis. The paper's selection of whole tensors (its Block mode) is not
implemented: every parameter's state has a fixed size here.

Difference to the released code: it compares the gap with the first tensor's step count since the
last reset, here each matrix's total step count decides.
"""

from __future__ import annotations

from typing import ClassVar

from ..engine import checks
from ..engine.keywords import Keyword
from ..engine.method import method
from ..engine.optimizer import LowRankOptimizer
from ..engine.options import Group
from ..engine.rule_families import TORCH_ADAMW


@method(
    "frugal_adamw",
    paper="2411.07837",
    summary="FRUGAL: Adam on random coordinates, signSGD elsewhere",
    state="2 n r, and 4 r bytes",
)
class FrugalAdamW(LowRankOptimizer):
    """FRUGAL with AdamW; `capturable` needs `moments="keep"`.

    Group keys: `density` (or `rank`; `is_proj_params=True` stands for the constructor's density),
    `update_proj_gap`, `scale` (the released code's scale of the active part, which multiplies both
    parts), `projector`, `inactive_lr_scale`, `inactive_update` ("sign" or "sgd").
    """

    rule = TORCH_ADAMW
    # The default does not switch projection on; a given density becomes a rank ratio.
    ungrouped = ("density",)
    projection_defaults: ClassVar = {
        "projector": "coordinate",
        "residual": "sign",
        "moments": "reset",
        "scale": 1.0,
    }
    own_keywords = (Keyword("density", 0.25, "of groups with `is_proj_params=True`, in (0, 1]."),)
    foreign_keys = ("density", "is_proj_params")

    @classmethod
    def translate(cls, options: Group, defaults: Group | None) -> Group:
        """A group's density as a rank ratio, which takes precedence over a rank."""
        options = dict(options)
        if defaults is None:
            rank_ratio(options.get("density", 1.0))
            return options
        density = options.pop("density", None)
        if options.pop("is_proj_params", False) and density is None and "rank" not in options:
            density = defaults["density"]
        if density is not None:
            options["rank_ratio_matrix"] = rank_ratio(density)
        return options


def rank_ratio(density: float) -> float:
    """The `rank_ratio_matrix` of a density: min(m, n) // ratio = floor(density min(m, n)).

    Raises:
        ValueError: the density is not in (0, 1].
    """
    checks.number("density", density, low=0.0, high=1.0, low_open=True)
    # Slightly less than 1 / density, so that rounding errors never reduce the rank by one.
    return max(1.0, (1.0 - 1e-12) / density)
