"""LISA: AdamW on a few layers at a time, drawn anew every period.

Pan et al., "LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model
Fine-Tuning" (arXiv 2403.17919). In each period of `update_proj_gap` steps AdamW trains embeddings,
head and all else outside of the layers, and `active_layers` of the model's N layers, drawn without
replacement. The others rest: no update, no weight decay, and no state. The moments of a layer that
comes to rest are dropped, and a later turn begins with fresh ones and fresh bias corrections.

    period p:  A ~ draw(active_layers of N, seed, step);   W_l <- AdamW(W_l, G_l) for l in A

`sampling="uniform"` is the paper's: with probability active_layers / N each. "norm" draws a layer
with probability proportional to ||W_l||_F over all of its parameters as they are at the draw (the
paper's motive is that layers differ by their weights' norms; this form is ours). The first draw is
uniform.

Memory: 2 m n entries for a matrix of a layer in its turn and for all outside of layers, nothing for
the others: with P_l entries a layer and P_o outside, 2 (active_layers P_l + P_o).

Not verified against the paper's code, chosen here: draws are by (seed, step), so that they are
equal on all processes and in a resumed run; a layer that is drawn twice in a row keeps its moments,
which makes `active_layers=N` AdamW. `requires_grad` is left as it is: a backward pass makes resting
layers' gradients too, a clipped norm includes them, and `update_in_backward` frees each at once.

On a LLaMA of 1M parameters (2 of 4 layers, periods of 10, 200 steps of the standard library's text,
one seed) perplexity was 102.5 at a rate of 0.001, where AdamW has 103.3; 110.3 at 0.003, and 109.4
by norm; 389 at 0.01.

A layer is an element of the model's list of layers, norms and biases included (`blocks_of`). On
several processes all draw as one would; "norm" adds one all-reduce of N numbers a draw under FSDP2
and DeepSpeed's ZeRO. ZeRO's partitions step one after another: the last one ends the step, and
draws.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowrank.cuda.noise import mix

from ..blocks import block_groups, draw_blocks
from ..engine import checks
from ..engine.composition import Composition
from ..engine.keywords import Keyword
from ..engine.method import method
from ..engine.optimizer import LowRankOptimizer
from ..engine.options import Group
from ..engine.plan import Given, Plan
from ..engine.row_block import RowBlock
from ..engine.rule_families import TORCH_ADAMW
from ..engine.sharding import Shard, shard_of
from ..engine.warn import warn_user
from ..rules import Resting

SAMPLING = ("uniform", "norm")
#: Counter in each state: `step()` calls so far, which a resting layer's `step` doesn't count.
CALLS = "calls"


@method(
    "lisa_adamw",
    paper="2403.17919",
    summary="LISA: AdamW on a few layers in turns, no state for layers out of their turn",
    state="2 m n",
    groups=block_groups,
)
class LisaAdamW(LowRankOptimizer):
    """AdamW on `active_layers` of the groups with `block`, drawn every period, and on all others.

    Group keys: `block`, a layer's number (several groups may share one; None is always trained),
    and `active`, which the optimizer sets. `build` and `block_groups(model)` make such groups.
    """

    projects: ClassVar[bool] = False
    hidden_keys: ClassVar[tuple[str, ...]] = ("block", "active")
    set_keys: ClassVar[tuple[str, ...]] = ("active",)
    rule = TORCH_ADAMW.but(weight_decay=0.0, capturable=False)
    own_keywords = (
        Keyword("update_proj_gap", 20, "steps of a period."),
        Keyword("active_layers", 2, "layers that are trained in a period; at most all."),
        Keyword("sampling", "uniform", '"uniform", or "norm" (by the norm of a layer\'s weights).'),
        Keyword("seed", 0, "of the draws, and of stochastic rounding."),
    )

    def compose(self, group: Group) -> Composition:
        """AdamW, or nothing for a layer out of its turn."""
        checks.integer("update_proj_gap", group["update_proj_gap"], low=1)
        checks.integer("active_layers", group["active_layers"], low=1)
        checks.choice("sampling", group["sampling"], SAMPLING)
        checks.integer("seed", group["seed"], low=0)
        if group.get("block") is not None:
            checks.integer("block", group["block"], low=0)
        checks.choice("active", group.setdefault("active", False), (True, False))
        adam = self.rule.make(group)
        return Composition(Resting(adam) if _rests(group) else adam, counters=(CALLS,))

    def _begin(self) -> None:
        """Draws the layers of the first period, unless the groups say which are trained."""
        if not self.active_blocks():
            self._draw()

    def _warn_of_groups(self) -> None:
        blocks, count = self._blocks(), self.defaults["active_layers"]
        if blocks and count >= len(blocks):
            warn_user(
                f"{type(self).__name__}: active_layers={count} of {len(blocks)} layers trains all "
                "of them in each period, as AdamW does, with AdamW's memory"
            )
        if not blocks:
            warnings.warn(
                f"{type(self).__name__}: no parameter group has a block, so all are trained, as by "
                "AdamW; build('lisa_adamw', model) or block_groups(model) sorts parameters",
                stacklevel=3,
            )

    def active_blocks(self) -> list[int]:
        """Numbers of the layers that are trained in this period, ascending."""
        return sorted({g["block"] for g in self.param_groups if _turns(g) and not _rests(g)})

    def warn_of_length(self, steps: int) -> None:
        """Warns if some layers can't have a turn in a run of so many steps."""
        blocks, options = len(self._blocks()), self.defaults
        turns = options["active_layers"] * -(-steps // options["update_proj_gap"])
        if turns < blocks:
            warn_user(
                f"{type(self).__name__}: {steps} steps of update_proj_gap="
                f"{options['update_proj_gap']} and active_layers={options['active_layers']} train "
                f"at most {turns} of {blocks} layers; the others stay as they were initialised"
            )

    def _blocks(self) -> list[int]:
        return sorted({group["block"] for group in self.param_groups if _turns(group)})

    # The step

    def _make_attributes(self) -> None:
        super()._make_attributes()
        self._stepped: frozenset[int] = frozenset()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores a pickle or copy."""
        self.__dict__.setdefault("_stepped", frozenset())
        super().__setstate__(state)

    def _advance(self, plans: Sequence[Plan]) -> None:
        super()._advance(plans)
        if not self._step_ended():
            return
        calls = self._calls() + 1
        for group in self.param_groups:  # engines may have entries of their own in the state
            for param in group["params"]:
                if param in self.state:
                    self.state[param][CALLS] = calls
        gap = next((g["update_proj_gap"] for g in self.param_groups if _turns(g)), None)
        if gap is not None and calls % gap == 0:
            for plan in plans:
                plan.release()  # or moments that are dropped would live on until the step's end
            self._draw()

    def _advance_group(self, plan: Plan, first: int, count: int, given: Given) -> None:
        if not _rests(plan.group):
            super()._advance_group(plan, first, count, given)

    def _step_ended(self) -> bool:
        """Whether the step is done: under ZeRO when each partition has taken it."""
        partitions = self._partitions
        if partitions is None:
            return True
        if not self._stepped.isdisjoint(partitions.stepping):
            self._stepped = frozenset()  # an error ended the former step before its end
        self._stepped |= partitions.stepping
        if self._stepped != {place.partition for place in partitions.places}:
            return False
        self._stepped = frozenset()
        return True

    # The draw

    def _calls(self) -> int:
        return max((int(state.get(CALLS, 0)) for state in self.state.values()), default=0)

    def _draw(self) -> None:
        """Draws the layers of the next period, and drops and makes states."""
        own = [group for group in self.param_groups if _turns(group)]
        if not own:
            return
        blocks, calls, options = self._blocks(), self._calls(), own[0]
        weights = self._norms(own) if options["sampling"] == "norm" and calls else None
        seed = mix(options["seed"], "active layers", calls)
        active = draw_blocks(blocks, options["active_layers"], seed, weights)
        changed = [group for group in own if group.get("active") is not (group["block"] in active)]
        # What is dropped makes room for what is made.
        for group in sorted(changed, key=lambda group: group["block"] in active):
            group["active"] = group["block"] in active
            self._renew(group, calls)

    def _renew(self, group: Group, calls: int) -> None:
        """Gives a group's parameters the states of its new composition."""
        composition = self.compose(group)
        for param in group["params"]:
            if param.numel():
                made = self.make_state(param, composition, group)
                self.state[param] = {**made, CALLS: calls}
        self._record(group, composition)

    def _norms(self, groups: Sequence[Group]) -> dict[int, float]:
        """The norm of each block's parameters, equal on all processes."""
        pairs = [(group["block"], param) for group in groups for param in group["params"]]
        shards = [shard_of(param) for _, param in pairs]
        spread = next((s.rows.processes for s in shards if not s.rows.processes.alone), None)
        squares: dict[int, Tensor] = {}
        for (block, param), shard in zip(pairs, shards, strict=True):
            own = self._entries(param, shard).double().square().sum()
            if spread is not None and shard.rows.processes.alone:
                own = own / spread.world  # whole on each process
            squares[block] = squares[block] + own if block in squares else own
        total = torch.stack(list(squares.values()))
        total = total if spread is None else spread.sum(total)
        return dict(zip(squares, total.sqrt().tolist(), strict=True))

    def _entries(self, param: Tensor, shard: Shard) -> Tensor:
        """The entries of a parameter that are here."""
        if isinstance(param, RowBlock) and self._partitions is not None:
            return self._partitions.entries(param)
        return shard.local(param.detach())


def _turns(group: Group) -> bool:
    return group.get("block") is not None


def _rests(group: Group) -> bool:
    return _turns(group) and not group.get("active")
