"""ReLoRA: high-rank training through many low-rank updates.

Lialin et al., "ReLoRA: High-Rank Training Through Low-Rank Updates" (arXiv 2307.05695). Each layer
is a frozen weight and factors, W = W_f + c B A with c = alpha / r; only A, B and what is not a
matched linear layer are trained. At the end of every `update_proj_gap`-th step

    W_f <- W_f + c B A,   A <- U(+-1/sqrt(n)),   B <- 0

and the moments of A and B are pruned, so that the new factors don't continue in the old direction.
Both moments of an entry are kept or zeroed together, and Adam's bias corrections count from the
merge; the factors' learning rate then warms up for `rewarm` steps. Other parameters keep theirs.

The released code (`official=True`) prunes each moment independently and continues the step counts.
An entry of M with V set to zero takes steps of M / (sqrt(0.001) |G|), and one with both set to zero
takes steps of 3 lr; that code leaves the learning rate's re-warm-up to the schedule
(`cosine_restarts` of our trainer), without which such steps can end in NaN.

`heads=H` (an option of the layers) trains H pairs of factors, each on its share of the batch, and
merges their mean: LoRA-the-Explorer (Huh et al., arXiv 2402.16728). Its released code keeps the
factors at a merge and subtracts the merged product afterwards; here they are reset as in ReLoRA,
which needs no copy of them.

Memory per m x n matrix with b-byte parameters: b (m n + r (m + n)) for weights, 2 b r (m + n) for
moments and b r (m + n) for gradients.

The sum is taken in fp32 and rounded stochastically where W_f is bf16, so that a small B A is
preserved in expectation (`LowRankLinear.merge`). A is drawn from (seed, layer, merge), equal on
every process. Under FSDP2 and ZeRO a merge gathers A (and B, where ZeRO cuts it in other rows than
W_f), and pruning by magnitude the first moments; each process adds to its rows of W_f. `heads`
divide each process's own batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowrank.cuda.noise import mix

from ..engine import checks
from ..engine.composition import Composition
from ..engine.keywords import Keyword
from ..engine.method import Conversion, method
from ..engine.options import Group
from ..engine.rule_factories import adam_rule
from ..layers import FactoredLinear, LowRankLinear
from ..layers.events import LayerEvent
from ..layers.link import Link
from ..layers.optimizer import FactoredAdamW
from ..layers.rewarm import Rewarmed
from ..layers.spread import held_rows
from ..rules import UpdateRule

#: Resets of the factors' moments at a merge.
RESETS = ("zero", "random", "magnitude", "none")
#: Upper bound of the default re-warm-up.
LONGEST_REWARM = 100


@method(
    "relora_adamw",
    paper="2307.05695",
    summary="ReLoRA: low-rank factors merged into a frozen weight",
    state="2 r (m + n)",
    weights="m n + r (m + n)",
    conversion=Conversion.to_layers(LowRankLinear, "alpha", "heads", alpha=32.0),
)
class ReLoRAAdamW(FactoredAdamW):
    """ReLoRA with AdamW; all other parameters get plain AdamW.

    Group key `update_proj_gap` (official name `relora`): steps between merges. The learning rate is
    about twice a full-rank one (the paper's rule of thumb).
    """

    layer_type: ClassVar[type[FactoredLinear]] = LowRankLinear
    event_options: ClassVar[tuple[str, ...]] = ("update_proj_gap",)
    aliases: ClassVar = {"relora": "update_proj_gap"}
    own_keywords = (
        Keyword("update_proj_gap", 1000, "steps between merges."),
        Keyword(
            "reset",
            "random",
            'what becomes of the factors\' moments at a merge: "zero", "random" (each entry is '
            'kept with probability 1 - prune_ratio), "magnitude" (kept where the first moment is '
            'among its largest 1 - prune_ratio) or "none", with which bias corrections go on.',
        ),
        Keyword("prune_ratio", 0.999, "share of entries that are set to zero."),
        Keyword("seed", 0, "of the factors and of random pruning."),
        Keyword(
            "rewarm",
            None,
            "w, steps after a merge in which the factors' learning rate rises: in the s-th it is "
            "lr s / (w + 1). 0 for none, which is right where the schedule restarts with the "
            "merges; None for a tenth of the gap, at least 1 and at most 100.",
        ),
        Keyword(
            "official",
            False,
            "the released code's numbers: each moment is pruned for itself, bias corrections go "
            "on, and `rewarm=None` is 0.",
        ),
    )

    def compose(self, group: Group) -> Composition:
        """AdamW, and the checked schedule."""
        checks.integer("update_proj_gap", group["update_proj_gap"], low=1)
        checks.choice("reset", group["reset"], RESETS)
        checks.number("prune_ratio", group["prune_ratio"], low=0.0, high=1.0)
        checks.integer("seed", group["seed"], low=0)
        checks.choice("official", group["official"], (True, False))
        if group["rewarm"] is not None:
            checks.integer("rewarm", group["rewarm"], low=0)
        return super().compose(group)

    def factor_rule(self, group: Group) -> UpdateRule:
        """Adam whose bias corrections and learning rate warm-up restart at each merge."""
        restarts = not group["official"] and group["reset"] != "none"
        rule, steps = adam_rule(group, restarts=restarts), rewarm_steps(group)
        return Rewarmed(rule, steps)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores a state; one of version 0.1, without the new options, behaves as it did."""
        for group in state["param_groups"]:
            if "official" not in group:
                group.update(official=True, rewarm=0)
        super().__setstate__(state)

    def _after(self) -> None:
        due = self._due("update_proj_gap")
        with self._frozen_rows(due):
            for link in due:
                self._merge(link)
        if due:
            self._call_event_hooks(LayerEvent("merge", self._steps(due[0]), len(due)))

    def _merge(self, link: Link) -> None:
        assert isinstance(link.layer, LowRankLinear)
        count = self._passed(link, "update_proj_gap")
        seed = link.seed(count)
        link.layer.merge(seed)
        group = link.group
        for position, param in enumerate(link.factors()):
            state = self.state[param]
            state["events"], state["refreshed_at"] = count, int(state["step"])
            moments = [state[key] for key in ("exp_avg", "exp_avg_sq")]
            batches = [[moment] for moment in moments] if group["official"] else [moments]
            for which, together in enumerate(batches):
                own = mix(seed, position, which)
                prune_(together, group["reset"], group["prune_ratio"], own, param)


def rewarm_steps(group: Group) -> int:
    """Steps of re-warm-up of a group's learning rate after a merge."""
    if group["rewarm"] is not None:
        return int(group["rewarm"])
    return 0 if group["official"] else min(max(1, group["update_proj_gap"] // 10), LONGEST_REWARM)


def prune_(
    moments: Sequence[Tensor], how: str, ratio: float, seed: int, of: Tensor | None = None
) -> None:
    """In place: sets a share of the entries to zero, the same entries in each moment.

    Args:
        moments: of one shape; "magnitude" ranks the entries of the first. If their rows are spread
            over processes, all prune as one would.
        how: one of `RESETS`.
        ratio: share of the entries.
        seed: of "random"; equal seeds prune equally on every device.
        of: the parameter that they belong to, see `held_rows`.
    """
    parts = [held_rows(moment, of) for moment in moments]
    first = parts[0]
    shape = (first.count, *moments[0].shape[1:])
    if how == "zero":
        for part in parts:
            part.local.zero_()
    elif how == "random":
        generator = torch.Generator().manual_seed(seed)
        kept = torch.rand(shape, generator=generator) > ratio
        for part in parts:
            part.local.mul_(kept[part.rows].to(part.local.device))
    elif how == "magnitude":
        ranked = first.whole().reshape(-1).abs().argsort(stable=True)
        lost = torch.zeros(len(ranked), dtype=torch.bool, device=ranked.device)
        lost[ranked[: int(ratio * len(ranked))]] = True
        for part in parts:
            part.local.masked_fill_(lost.view(shape)[part.rows], 0)
