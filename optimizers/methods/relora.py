"""ReLoRA: high-rank training through many low-rank updates.

Lialin et al., "ReLoRA: High-Rank Training Through Low-Rank Updates" (arXiv 2307.05695). Each layer
is a frozen weight and factors, W = W_f + c B A with c = alpha / r; only A, B and what is not a
matched linear layer are trained. At the end of every `update_proj_gap`-th step

    W_f <- W_f + c B A,   A <- U(+-1/sqrt(n)),   B <- 0

and the moments of A and B are pruned, so that the next factors don't go on in the old direction.
The learning rate's re-warm-up after a merge is the schedule's (`cosine_restarts`).

`heads=H` (an option of the layers) trains H pairs of factors, each on its share of the batch, and
merges their mean: LoRA-the-Explorer (Huh et al., arXiv 2402.16728). Its released code keeps the
factors at a merge and subtracts what was merged from then on; here they start anew as ReLoRA's do,
which needs no copy of them.

Memory per m x n matrix with b-byte parameters: b (m n + r (m + n)) for weights, 2 b r (m + n) for
moments and b r (m + n) for gradients.

The sum is taken in fp32 and rounded stochastically where W_f is bf16, so that a small B A is kept
in the mean (`LowRankLinear.merge`). A is drawn from (seed, layer, merge), equal on every process.
"""

from __future__ import annotations

from typing import ClassVar, Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lowrank.cuda.noise import mix

from ..engine import checks
from ..engine.composition import Composition
from ..engine.options import CommonOptions, Group
from ..layers import FactoredLinear, LowRankLinear
from ..layers.events import LayerEvent
from ..layers.optimizer import FactoredAdamW, Link

#: What may become of the factors' moments at a merge.
RESETS = ("zero", "random", "magnitude", "none")


class ReLoRAAdamW(FactoredAdamW):
    """ReLoRA with AdamW; all other parameters get plain AdamW.

    Group key `update_proj_gap` (official name `relora`): steps between merges.
    """

    layer_type: ClassVar[type[FactoredLinear]] = LowRankLinear
    event_options: ClassVar[tuple[str, ...]] = ("update_proj_gap",)
    aliases = {"relora": "update_proj_gap"}  # noqa: RUF012

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        update_proj_gap: int = 1000,
        reset: str = "random",
        prune_ratio: float = 0.999,
        seed: int = 0,
        **options: Unpack[CommonOptions],
    ) -> None:
        """Makes the optimizer.

        Args:
            params: `param_groups(model)` of a converted model.
            lr: learning rate; about twice a full-rank one (the paper's rule of thumb).
            betas: decay rates of the moments.
            eps: added to sqrt(V) after bias correction.
            weight_decay: decoupled, before the update.
            update_proj_gap: steps between merges.
            reset: what becomes of the factors' moments at a merge: "zero", "random" (each entry is
                kept with probability 1 - prune_ratio), "magnitude" (the largest 1 - prune_ratio of
                each moment are kept) or "none". Step counts go on.
            prune_ratio: share of entries that are set to zero.
            seed: of the factors and of random pruning.
            **options: see `CommonOptions`.

        Raises:
            ValueError: an option is unknown or out of range, or a parameter can't be optimized.
        """
        own = {
            "update_proj_gap": update_proj_gap,
            "reset": reset,
            "prune_ratio": prune_ratio,
            "seed": seed,
        }
        super().__init__(params, lr, betas, eps, weight_decay, own, **options)

    def compose(self, group: Group) -> Composition:
        """AdamW, and the checked schedule."""
        checks.integer("update_proj_gap", group["update_proj_gap"], low=1)
        checks.choice("reset", group["reset"], RESETS)
        checks.number("prune_ratio", group["prune_ratio"], low=0.0, high=1.0)
        checks.integer("seed", group["seed"], low=0)
        return super().compose(group)

    def _after(self) -> None:
        due = self._due("update_proj_gap")
        for link in due:
            self._merge(link)
        if due:
            self._call_event_hooks(LayerEvent("merge", self._steps(due[0]), len(due)))

    def _merge(self, link: Link) -> None:
        assert isinstance(link.layer, LowRankLinear)
        count = self._passed(link, "update_proj_gap")
        seed = mix(link.group["seed"], link.index, count)
        link.layer.merge(seed)
        for position, param in enumerate(link.factors()):
            state = self.state[param]
            state["events"] = count
            for which, key in enumerate(("exp_avg", "exp_avg_sq")):
                prune_(
                    state[key],
                    link.group["reset"],
                    link.group["prune_ratio"],
                    mix(seed, position, which),
                )


def prune_(moment: Tensor, how: str, ratio: float, seed: int) -> None:
    """In place: sets a share of a moment's entries to zero.

    Args:
        moment: of any shape.
        how: one of `RESETS`.
        ratio: share of the entries.
        seed: of "random"; equal seeds prune equally on every device.
    """
    if how == "zero":
        moment.zero_()
    elif how == "random":
        generator = torch.Generator().manual_seed(seed)
        kept = torch.rand(moment.shape, generator=generator) > ratio
        moment.mul_(kept.to(moment.device))
    elif how == "magnitude":
        pruned = int(ratio * moment.numel())
        if pruned:
            flat = moment.view(-1)
            order = flat.abs().argsort(stable=True)
            flat[order[:pruned]] = 0
