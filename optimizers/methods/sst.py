"""SST: trains all singular values of a weight and a changing subset of its singular vectors.

Zhao et al., "Sparse Spectral Training and Inference on Euclidean and Hyperbolic Neural Networks"
(arXiv 2405.15481). Each matched layer is W = U diag(s) V^T with k = min(m, n) triples
(`layers.spectral`). All of s is trained, and of U and V the r active columns, whose gradients are
not scaled by s ("enhanced"). After each step

    s <- max(s, 0),   u_i <- u_i / ||u_i||,   v_i <- v_i / ||v_i||   for active i

and after each `update_proj_gap` steps (an iteration) r columns are redrawn, with reset moments
and bias corrections. After ceil(k / r) iterations (a round) U, s, V <- SVD(U diag(s) V^T) comes
first; the moments of s are permuted with the values. Weight decay only affects s, since vectors are
renormalised. The learning rate's warm-up after a draw is left to the schedule (`cosine_restarts`).

Memory per m x n matrix with b-byte parameters: b k (m + n + 1) for weights, 2 b (r (m + n) + k) for
moments and half of that for gradients.

Under FSDP2 the SVD gathers U, s and V of one layer at a time, which together are not smaller than
W, on every process.

Not specified by the sources, chosen here: draws are without replacement, with the probability
(1 / k + s_i / sum s) / 2 (`sampling` has others), from (seed, layer, iteration), equal on every
process. On a LLaMA of 1M parameters, 320 steps of English text and three seeds, none of this
mattered: perplexity was 100.5 with the defaults and a gap of 40, 100.2 by singular value alone,
100.6 uniformly, 100.4 with gradients scaled by s or with fresh moments for s, 100.7 with gaps of 10
or 20 or a re-warm-up after each draw, and 100.1 with a gap of 80.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..engine import checks
from ..engine.composition import Composition
from ..engine.keywords import Keyword
from ..engine.method import Conversion, method
from ..engine.options import Group
from ..layers import FactoredLinear
from ..layers.events import LayerEvent
from ..layers.link import Link
from ..layers.optimizer import FactoredAdamW
from ..layers.spectral import SAMPLING, SpectralLinear, sample
from ..layers.spread import held_rows
from ..rules import UpdateRule

_MOMENTS = ("exp_avg", "exp_avg_sq")


@method(
    "sst_adamw",
    paper="2405.15481",
    summary="SST: U diag(s) V^T, all of s and r vectors in turns are trained",
    state="2 (r (m + n) + m)",
    weights="m (m + n + 1)",
    conversion=Conversion.to_layers(SpectralLinear, "enhanced"),
)
class SSTAdamW(FactoredAdamW):
    """SST with AdamW; all other parameters get plain AdamW.

    Group key `update_proj_gap`: steps of an iteration.
    """

    layer_type: ClassVar[type[FactoredLinear]] = SpectralLinear
    event_options: ClassVar[tuple[str, ...]] = ("update_proj_gap",)
    own_keywords = (
        Keyword("update_proj_gap", 200, "steps between draws of the active vectors."),
        Keyword("sampling", "mixed", '"mixed", "singular" (by singular value alone) or "uniform".'),
        Keyword("seed", 0, "of the draws."),
    )

    def compose(self, group: Group) -> Composition:
        """The rules, and the checked schedule."""
        checks.integer("update_proj_gap", group["update_proj_gap"], low=1)
        checks.choice("sampling", group["sampling"], SAMPLING)
        checks.integer("seed", group["seed"], low=0)
        return super().compose(group)

    def factor_rule(self, group: Group) -> UpdateRule:
        """Adam whose bias corrections restart at each draw."""
        return self.rule.make(group, restarts=True)

    def _after(self) -> None:
        due = self._due("update_proj_gap")
        for link in self._links:
            assert isinstance(link.layer, SpectralLinear)
            if any(self._had_gradient(param) for param in link.factors()):
                link.layer.clamp_singular_values()
                link.layer.renormalize()
        with self._frozen_rows(due):
            again = sum(self._redecompose(link) for link in due)
            for link in due:
                self._resample(link)
        if again:
            self._call_event_hooks(LayerEvent("redecompose", self._steps(due[0]), again))
        if due:
            self._call_event_hooks(LayerEvent("resample", self._steps(due[0]), len(due)))

    def _redecompose(self, link: Link) -> bool:
        """Redecomposes a layer at the end of a round; returns whether it did."""
        layer = link.layer
        assert isinstance(layer, SpectralLinear)
        rounds = -(-len(layer.singular_values) // layer.rank)
        if self._passed(link, "update_proj_gap") % rounds:
            return False
        values = held_rows(layer.singular_values).whole()
        order = values.argsort(descending=True, stable=True)
        if not layer.redecompose():
            return False
        self._permute(layer.singular_values, order)
        return True

    def _resample(self, link: Link) -> None:
        layer, group = link.layer, link.group
        assert isinstance(layer, SpectralLinear)
        count = self._passed(link, "update_proj_gap")
        generator = torch.Generator().manual_seed(link.seed(count))
        values = held_rows(layer.singular_values).whole()
        selected = sample(values, layer.rank, generator, group["sampling"])
        self._permute(layer.singular_values, layer.resample(selected))
        rule = self.factor_rule(group)
        self._renew(layer.left, rule)
        self._renew(layer.right, rule)
        for param in link.factors():
            self.state[param]["events"] = count

    def _permute(self, values: Tensor, order: Tensor) -> None:
        state = self.state[values]
        for key in _MOMENTS:
            held = held_rows(state[key], values)
            held.fill(held.whole()[order.to(held.local.device)])
