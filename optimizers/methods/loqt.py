"""LoQT: one low-rank factor trained on top of a 4-bit weight.

Loeschcke et al., "LoQT: Low-Rank Adapters for Quantized Pretraining" (arXiv 2405.16528). Each
matched layer is W = W_q + c P B (`layers.quantized_low_rank`) of which only B is trained. At the
steps T_0 = 0, T_{i+1} = T_i + gap + floor(growth^i) the backward pass computes the gradient G of W
itself, and before the step

    W <- W_q + c P B,   P <- leading singular vectors of G,   (W_q, B) <- W up to rounding

B's moments are reset, and its gradient, which belongs to the previous basis, counts as zero.

Memory per m x n matrix in NF4, with b-byte parameters and d = min(m, n), l = max(m, n):
(m n + d r) (1 / 2 + b / 64) + b l r for weights, 2 b l r for moments, b l r for gradients; at
the steps T_i b m n for the gradient of W.

G is summed over micro-batches and, where `torch.distributed` is on, averaged over all processes;
a process without a gradient of a layer counts as zero there. Under FSDP2 and ZeRO only B and its
moments are spread; W_q and P, which are quantised, are whole on each process, and so are G and W at
a new P.
Difference: the released code keeps B's moments (`reset="none"`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ..engine import checks
from ..engine.composition import Composition
from ..engine.geometry import Side
from ..engine.keywords import Keyword
from ..engine.method import Conversion, method
from ..engine.options import Group
from ..engine.warn import warn_user
from ..layers import FactoredLinear, QuantizedLowRankLinear
from ..layers.events import LayerEvent
from ..layers.link import Link
from ..layers.mean import mean_gradients
from ..layers.optimizer import FactoredAdamW
from ..projectors import REFRESH_MODES
from ..projectors.decompositions import bases
from ..rules import UpdateRule

#: Resets of the factor's moments when its basis changes.
RESETS = ("zero", "none")


@method(
    "loqt_adamw",
    paper="2405.16528",
    summary="LoQT: a factor beside an NF4 weight, on a basis of its gradient",
    state="2 n r",
    weights="n r, and m (n + r) / 2 bytes",
    conversion=Conversion.to_layers(
        QuantizedLowRankLinear, "scale", "weight_format", "basis_format"
    ),
)
class LoQTAdamW(FactoredAdamW):
    """LoQT with AdamW; all other parameters get plain AdamW.

    Group key `update_proj_gap`: initial number of steps between bases.
    """

    layer_type: ClassVar[type[FactoredLinear]] = QuantizedLowRankLinear
    event_options: ClassVar[tuple[str, ...]] = ("update_proj_gap", "gap_growth")
    rule = FactoredAdamW.rule.but(lr=1e-2)
    own_keywords = (
        Keyword("update_proj_gap", 100, "steps between bases, at first."),
        Keyword(
            "gap_growth",
            1.2,
            "each gap is longer by this to the power of the bases before; 0 for none.",
        ),
        Keyword(
            "compensation_steps",
            5,
            "turns in which B takes over what rounding W loses; 0 for none.",
        ),
        Keyword("reset", "zero", 'what becomes of B\'s moments: "zero" or "none".'),
        Keyword("refresh", "eigh", "how the basis is computed, as in GaLore."),
        Keyword("seed", 0, 'of `refresh="randomized"`.'),
    )

    def _make_attributes(self) -> None:
        super()._make_attributes()
        self._warned = False
        self._renewed: list[tuple[Link, float]] = []

    def compose(self, group: Group) -> Composition:
        """The rules, and the checked schedule."""
        checks.integer("update_proj_gap", group["update_proj_gap"], low=1)
        checks.number("gap_growth", group["gap_growth"], low=0.0)
        checks.integer("compensation_steps", group["compensation_steps"], low=0)
        checks.choice("reset", group["reset"], RESETS)
        checks.choice("refresh", group["refresh"], REFRESH_MODES)
        checks.integer("seed", group["seed"], low=0)
        return super().compose(group)

    def factor_rule(self, group: Group) -> UpdateRule:
        """Adam whose bias corrections count from the last reset of its moments."""
        return self.rule.make(group, restarts=True)

    def attach(self, model: nn.Module) -> Self:
        """See `FactoredAdamW.attach`."""
        super().attach(model)
        self._watch()
        return self

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state; makes the layers compute the gradients that the next step needs."""
        super().load_state_dict(state_dict)
        self._watch()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears gradients, including those of full weights."""
        super().zero_grad(set_to_none)
        self._watch()

    def _kept_for_step(self) -> dict[int, str]:
        reason = "a new basis comes before its update"
        due = [link for link in self._links if self._is_due(link)]
        return {id(param): reason for link in due for param in link.factors()}

    def _not_saved(self) -> str | None:
        for link in self._links:
            if self._gradient(link) is not None:
                return f"the gradient of the full weight of {link.name}"
        return None

    def _before(self) -> None:
        due = [link for link in self._links if self._is_due(link)]
        gradients = mean_gradients([self._gradient(link) for link in due], due)
        self._warn_of_missing(due, gradients)
        renewed = [
            (link, self._renew_basis(link, gradient))
            for link, gradient in zip(due, gradients, strict=True)
            if gradient is not None
        ]
        self._renewed = [(link, change) for link, change in renewed if change is not None]
        self._restart()

    def _warn_of_missing(self, due: Sequence[Link], gradients: Sequence[Tensor | None]) -> None:
        """Says once that a layer whose factor has a gradient has none of its full weight."""
        missing = [
            link.name
            for link, gradient in zip(due, gradients, strict=True)
            if gradient is None and link.factors()[0].grad is not None
        ]
        if missing and not self._warned:
            self._warned = True
            warn_user(
                f"{type(self).__name__} has no gradient of the full weight of {missing[0]}, from "
                "which its basis is computed, so the layer is not trained: accepted is "
                "loss.backward(), which torch.autograd.grad and backward(inputs=...) don't replace"
            )

    def _after(self) -> None:
        self._restart()  # a step without a gradient doesn't count
        if self._renewed:
            step = self._steps(self._renewed[0][0]) - 1
            change = max(change for _, change in self._renewed)
            self._call_event_hooks(LayerEvent("requantize", step, len(self._renewed), change))
        self._renewed = []
        self._watch()

    def _events_after(self, group: Group, steps: int) -> int:
        # A basis that is due now is computed in the next step.
        return bases_by(group, steps - 1) if steps else 0

    def _restart(self) -> None:
        for link, _ in self._renewed:
            if link.group["reset"] == "zero":
                self._renew(link.factors()[0], self.factor_rule(link.group))

    def _watch(self) -> None:
        """Makes each layer compute its weight's gradient if the next step is one of T_i."""
        for link in self._links:
            assert isinstance(link.layer, QuantizedLowRankLinear)
            link.layer.watch(on=False)
            link.layer.watch(on=self._is_due(link))

    def _is_due(self, link: Link) -> bool:
        if link.layer.factor.is_meta:
            return False
        return bases_by(link.group, self._steps(link)) > self._events(link)

    def _gradient(self, link: Link) -> Tensor | None:
        """This process's gradient of a weight, if both the weight and the factor have one."""
        assert isinstance(link.layer, QuantizedLowRankLinear)
        return link.layer.weight_gradient if link.layer.factor.grad is not None else None

    def _renew_basis(self, link: Link, gradient: Tensor) -> float | None:
        """Returns the weight's relative change; None if the gradient gives no basis."""
        layer, group = link.layer, link.group
        assert isinstance(layer, QuantizedLowRankLinear)
        factor = layer.factor
        largest = largest_entry(gradient)
        if not 0.0 < largest < float("inf"):
            return None
        count = bases_by(group, self._steps(link))
        side = Side.LEFT if layer.out_features <= layer.in_features else Side.RIGHT
        mode = "randomized" if group["refresh"] == "warm" and count == 1 else group["refresh"]
        previous = [layer.basis.dense(factor.dtype)] if mode == "warm" else [None]
        seed = link.seed(count)
        ((basis,),) = bases([gradient], [largest], layer.rank, side, mode, previous, seed)
        change = layer.renew(basis, group["compensation_steps"])
        if factor.grad is not None:
            self._replace_gradient(factor, torch.zeros_like(factor.grad))
        self.state[factor]["events"] = count
        return change


def bases_by(group: Group, step: int) -> int:
    """Number of T_0, T_1, ... that are at most `step`."""
    gap, growth = int(group["update_proj_gap"]), float(group["gap_growth"])
    due, count = 0, 0
    while due <= step:
        due += gap + int(min(growth**count, 1e9))
        count += 1
    return count


def largest_entry(matrix_mn: Tensor) -> float:
    """The largest magnitude, NaN if any entry is, without a temporary matrix."""
    low, high = matrix_mn.aminmax()
    return float(torch.maximum(high, -low))
