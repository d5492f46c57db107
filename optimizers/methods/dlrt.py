"""DLRT: dynamical low-rank training, rank-adaptive, by basis updates and Galerkin steps.

Schotthöfer et al., "Low-rank lottery tickets: finding efficient low-rank neural networks via matrix
differential equations" (arXiv 2205.13571). Each matched layer is W = U S V^T with orthonormal bases
(`layers.galerkin`). AdamW trains S alone, in fixed bases,

    S <- AdamW(S, U^T G V)

and after every `update_proj_gap` steps S is truncated to the least rank k <= r whose error is at
most `tolerance` of its norm, and the bases take up new directions from the last gradient,

    U' = orth[U P_k | G V Q],    V' = orth[V Q_k | G^T U P],    S' = U'^T W_k V'

with S = P D Q^T, which leaves W_k, the truncated W, as it is. Moments and bias corrections of S
restart, because its coordinates are new. Nothing of the other factors is optimised: the paper's
K- and L-steps K = U S - lr G V and L = V S^T - lr G^T U are used through the spans of [K | U] and
[L | V] alone, which are those of [G V | U] and [G^T U | V] whatever the rate.

Memory per m x n matrix with b-byte parameters: b (2 r (m + n) + 4 r^2) for weights and gradients
each, 8 r^2 moments: the only state. The rank of W is at most r after a basis update, 2 r between.

Deviations, chosen here: the paper takes two gradients of one batch in each step, one for the bases
and one for S in the new ones; here a step has one, and bases take those of the step before. Tensors
keep 2 r columns whatever the rank: `layer.kept` has it, a `LayerEvent` ("truncate") the error. New
directions are normalised gradients and fill all columns. The published tolerance and rates weren't
at hand: defaults are ours. On a LLaMA of 1M parameters (r = 32, gap 10, 200 steps of the standard
library's text, one seed) perplexity was 101.0 at a rate of 0.001, where AdamW has 103.3; 102.2 at
0.003 (102.6 with a gap of 20), and 236 at 0.01, which was too high. A layer begins with the r
leading singular triples of the dense weight.

Under FSDP2 and ZeRO a basis update gathers U, V and their gradients of one layer at a time, m x 2 r
numbers each, and every process decomposes alike.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from ..engine import checks
from ..engine.composition import Composition
from ..engine.keywords import Keyword
from ..engine.method import Conversion, method
from ..engine.options import Group
from ..engine.warn import warn_user
from ..layers import FactoredLinear
from ..layers.events import LayerEvent
from ..layers.galerkin import GalerkinLinear
from ..layers.link import Link
from ..layers.optimizer import FactoredAdamW
from ..layers.spread import held_rows
from ..param_groups import factored_groups
from ..rules import Resting, UpdateRule


def galerkin_groups(model: nn.Module, patterns: Any = None, **options: Any) -> list[Group]:
    """Groups of a converted model: the layers' S, their bases, other matrices, vectors.

    `patterns` was used by the conversion; further arguments are those of `factored_groups`.
    """
    factors, *others = factored_groups(model, **options)
    named = list(zip(factors["param_names"], factors["params"], strict=True))
    made = []
    for core in (True, False):
        own = [(n, p) for n, p in named if (n.rpartition(".")[2] == "core") is core]
        names, params = [n for n, _ in own], [p for _, p in own]
        made.append({**factors, "params": params, "param_names": names, "core": core})
    return [*made, *others]


@method(
    "dlrt_adamw",
    paper="2205.13571",
    summary="DLRT: U S V^T of adaptive rank, S is trained, bases follow the gradient",
    state="8 r r",
    weights="2 r (m + n) + 4 r r",
    groups=galerkin_groups,
    conversion=Conversion.to_layers(GalerkinLinear),
)
class DLRTAdamW(FactoredAdamW):
    """DLRT with AdamW on S; all other parameters get plain AdamW.

    Group keys: `update_proj_gap`, `tolerance`, and `core`, True for the group of the layers' S and
    False for that of their bases (`build` makes both).
    """

    layer_type: ClassVar[type[FactoredLinear]] = GalerkinLinear
    event_options: ClassVar[tuple[str, ...]] = ("update_proj_gap",)
    fixed_options: ClassVar[tuple[str, ...]] = ("capturable", "factors", "core")
    hidden_keys: ClassVar[tuple[str, ...]] = ("core",)
    own_keywords = (
        Keyword("update_proj_gap", 20, "steps between basis updates."),
        Keyword(
            "tolerance",
            0.05,
            "tau, largest relative error of a truncation; 0 truncates to the rank alone.",
        ),
    )

    def compose(self, group: Group) -> Composition:
        """The rules, and the checked schedule."""
        checks.integer("update_proj_gap", group["update_proj_gap"], low=1)
        checks.number("tolerance", group["tolerance"], low=0.0, high=1.0, high_open=True)
        if group.get("factors"):
            checks.choice("core", group.get("core"), (True, False))
        return super().compose(group)

    def factor_rule(self, group: Group) -> UpdateRule:
        """Adam whose bias corrections restart at each basis update, for S; nothing for bases."""
        adam = self.rule.make(group, restarts=True)
        return adam if group["core"] else Resting(adam)

    def attach(self, model: nn.Module) -> DLRTAdamW:
        """See `FactoredAdamW.attach`.

        Raises:
            ValueError: as there, or a factor is in a group of the wrong kind.
        """
        super().attach(model)
        owners = self._owners()
        for link in self._links:
            for name, param in zip(link.layer.FACTORS, link.factors(), strict=True):
                if owners[param]["core"] is not (name == "core"):
                    raise ValueError(
                        f"{link.name}.{name} is in a parameter group with core="
                        f"{owners[param]['core']!r}: accepted are the groups that "
                        "build('dlrt_adamw', model) makes"
                    )
        return self

    def warn_of_length(self, steps: int) -> None:
        """Warns if a run of so many steps has no basis update."""
        gap = self.defaults["update_proj_gap"]
        if gap >= steps:
            warn_user(
                f"{type(self).__name__}: update_proj_gap={gap} in a run of {steps} steps leaves "
                "the bases as they are in all of them; accepted is less"
            )

    def _kept_for_step(self) -> dict[int, str]:
        reason = "a basis update reads its gradient, after the step"
        return {id(param): reason for link in self._links for param in link.factors()[1:]}

    def _after(self) -> None:
        changes = [self._update_bases(link) for link in self._due("update_proj_gap")]
        done = [change for change in changes if change is not None]
        if done:
            steps = max(self._steps(link) for link in self._links)
            self._call_event_hooks(LayerEvent("truncate", steps, len(done), max(done)))

    def _update_bases(self, link: Link) -> float | None:
        """Updates a layer's bases, and returns the change; None leaves it to the next step."""
        layer = link.layer
        assert isinstance(layer, GalerkinLinear)
        core, *bases = link.factors()
        if any(param.grad is None for param in bases):
            return None
        grads = [held_rows(param.grad, param).whole() for param in bases if param.grad is not None]
        change = layer.update_bases(grads[0], grads[1], link.group["tolerance"])
        if change is None:
            return None
        count = self._passed(link, "update_proj_gap")
        self._renew(core, self.factor_rule(link.group))
        for param in link.factors():
            self.state[param]["events"] = count
        return change
