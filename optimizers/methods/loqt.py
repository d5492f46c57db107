"""LoQT: one small factor trained beside a weight in four bits.

Loeschcke et al., "LoQT: Low-Rank Adapters for Quantized Pretraining" (arXiv 2405.16528). Each
matched layer is W = W_q + c P B (`layers.quantized_low_rank`) of which only B is trained. At the
steps T_0 = 0, T_{i+1} = T_i + gap + floor(growth^i) the backward pass leaves the gradient G of W
itself, and before the step

    W <- W_q + c P B,   P <- leading singular vectors of G,   (W_q, B) <- W up to rounding

B's moments start anew and its own gradient, which was the former basis's, is taken as zero.

Memory per m x n matrix in NF4, with b-byte parameters and d = min(m, n), l = max(m, n):
(m n + d r) (1 / 2 + b / 64) + b l r for weights, 2 b l r for moments, b l r for gradients; at
the steps T_i b m n for the gradient of W.

G is summed over micro-batches and, where `torch.distributed` is on, averaged over all processes.
Ours: the released code keeps B's moments (`reset="none"`).
"""

from __future__ import annotations

from typing import Any, ClassVar, Self, Unpack

from torch import Tensor, distributed, nn
from torch.optim.optimizer import ParamsT

from lowrank.cuda.noise import mix

from ..engine import checks
from ..engine.composition import Composition
from ..engine.geometry import Side
from ..engine.options import CommonOptions, Group
from ..engine.rule_factories import adam_rule
from ..layers import FactoredLinear, QuantizedLowRankLinear
from ..layers.events import LayerEvent
from ..layers.optimizer import FactoredAdamW, Link
from ..projectors import REFRESH_MODES
from ..projectors.decompositions import bases
from ..rules import UpdateRule

#: What may become of the factor's moments when its basis changes.
RESETS = ("zero", "none")


class LoQTAdamW(FactoredAdamW):
    """LoQT with AdamW; all other parameters get plain AdamW.

    Group key `update_proj_gap`: steps between bases, at first.
    """

    layer_type: ClassVar[type[FactoredLinear]] = QuantizedLowRankLinear
    event_options: ClassVar[tuple[str, ...]] = ("update_proj_gap", "gap_growth")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        update_proj_gap: int = 100,
        gap_growth: float = 1.2,
        compensation_steps: int = 5,
        reset: str = "zero",
        refresh: str = "eigh",
        seed: int = 0,
        **options: Unpack[CommonOptions],
    ) -> None:
        """Makes the optimizer.

        Args:
            params: `param_groups(model)` of a converted model.
            lr: learning rate, float or 0-d tensor, read at each step.
            betas: decay rates of the moments.
            eps: added to sqrt(V) after bias correction.
            weight_decay: decoupled, before the update.
            update_proj_gap: steps between bases.
            gap_growth: each gap is longer by this to the power of the bases before; 0 for none.
            compensation_steps: turns in which B takes over what rounding W loses; 0 for none.
            reset: what becomes of B's moments: "zero" or "none".
            refresh: how the basis is computed, as in GaLore.
            seed: of `refresh="randomized"`.
            **options: see `CommonOptions`.

        Raises:
            ValueError: an option is unknown or out of range, or a parameter can't be optimized.
        """
        own = {
            "update_proj_gap": update_proj_gap,
            "gap_growth": gap_growth,
            "compensation_steps": compensation_steps,
            "reset": reset,
            "refresh": refresh,
            "seed": seed,
        }
        self._renewed: list[tuple[Link, float]] = []
        super().__init__(params, lr, betas, eps, weight_decay, own, **options)

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
        """Adam whose bias corrections count from when its moments last started anew."""
        return adam_rule(group, restarts=True)

    def attach(self, model: nn.Module) -> Self:
        """See `FactoredAdamW.attach`."""
        super().attach(model)
        self._watch()
        return self

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state; the layers collect what its next step needs."""
        super().load_state_dict(state_dict)
        self._watch()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears gradients, those of whole weights as well."""
        super().zero_grad(set_to_none)
        self._watch()

    def _before(self) -> None:
        due = [link for link in self._links if self._is_due(link)]
        renewed = [(link, self._renew_basis(link)) for link in due]
        self._renewed = [(link, change) for link, change in renewed if change is not None]
        self._restart()

    def _after(self) -> None:
        self._restart()  # the step that had no gradient doesn't count
        if self._renewed:
            step = self._steps(self._renewed[0][0]) - 1
            change = max(change for _, change in self._renewed)
            self._call_event_hooks(LayerEvent("requantize", step, len(self._renewed), change))
        self._renewed = []
        self._watch()

    def _events_after(self, group: Group, steps: int) -> int:
        # A basis that is due now is found in the step to come.
        return bases_by(group, steps - 1) if steps else 0

    def _restart(self) -> None:
        for link, _ in self._renewed:
            if link.group["reset"] == "zero":
                self._renew(link.factors()[0], self.factor_rule(link.group))

    def _watch(self) -> None:
        """Each layer collects its weight's gradient if the next step is one of T_i."""
        for link in self._links:
            assert isinstance(link.layer, QuantizedLowRankLinear)
            link.layer.watch(on=False)
            link.layer.watch(on=self._is_due(link))

    def _is_due(self, link: Link) -> bool:
        if link.layer.factor.is_meta:
            return False
        return bases_by(link.group, self._steps(link)) > self._events(link)

    def _renew_basis(self, link: Link) -> float | None:
        """How much the weight changed; None where there is no gradient to find a basis in."""
        layer, group = link.layer, link.group
        assert isinstance(layer, QuantizedLowRankLinear)
        gradient, factor = layer.weight_gradient, layer.factor
        if gradient is None or factor.grad is None:
            return None
        gradient = _averaged(gradient)
        largest = float(gradient.abs().max())
        if not 0.0 < largest < float("inf"):
            return None
        count = bases_by(group, self._steps(link))
        side = Side.LEFT if layer.out_features <= layer.in_features else Side.RIGHT
        mode = "randomized" if group["refresh"] == "warm" and count == 1 else group["refresh"]
        previous = [layer.basis.dense(factor.dtype)] if mode == "warm" else [None]
        seed = mix(group["seed"], link.index, count)
        ((basis,),) = bases([gradient], [largest], layer.rank, side, mode, previous, seed)
        change = layer.renew(basis, group["compensation_steps"])
        factor.grad.zero_()
        self.state[factor]["events"] = count
        return change


def bases_by(group: Group, step: int) -> int:
    """How many of T_0, T_1, ... are at most `step`."""
    gap, growth = int(group["update_proj_gap"]), float(group["gap_growth"])
    due, count = 0, 0
    while due <= step:
        due += gap + int(min(growth**count, 1e9))
        count += 1
    return count


def _averaged(gradient: Tensor) -> Tensor:
    """The mean over processes, which all must find the same basis."""
    if not distributed.is_available() or not distributed.is_initialized():
        return gradient
    size = distributed.get_world_size()
    if size > 1:
        distributed.all_reduce(gradient)
        gradient.div_(size)
    return gradient
