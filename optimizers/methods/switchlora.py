"""SwitchLoRA: factors of which a few vectors are switched with candidates at each step.

Zhou et al., "SwitchLoRA: Switched Low-Rank Adaptation Can Learn Full-Rank Information" (arXiv
2406.06564). At the start of step q, after backward, each layer (`layers.switched`) switches

    k = floor(r / interval) + Bernoulli(frac(r / interval)),  interval = i_0 / 0.3^((q+1) / (rho T))

rows of A with the next candidates, and k other columns of B in turn. W doesn't change. The
counterpart of a switched vector (b_i of a_i) gets zero moments and is frozen for `freeze_steps`
steps; the switched vector's moments are kept. Adam's bias corrections count each vector's steps
(`rules.vector_adam`).

Memory: as `layers.switched`, and 2 r (m + n) entries and 8 bytes a pair of vectors for moments.

The released code stops when the interval is too short for the freezing; here that is an error at
construction. Under FSDP2 and ZeRO candidates are whole on each process, and a switch exchanges
2 k (m + n) entries. Random numbers depend on (seed, layer, step), equal on every process.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowrank.cuda.noise import mix

from ..engine import checks
from ..engine.composition import Composition
from ..engine.gradients import finite
from ..engine.keywords import Keyword
from ..engine.method import Conversion, method
from ..engine.options import Group
from ..engine.processes import Processes
from ..engine.rule_factories import vector_adam_rule
from ..layers import FactoredLinear
from ..layers.events import LayerEvent
from ..layers.link import Link
from ..layers.optimizer import FactoredAdamW
from ..layers.spread import held_rows
from ..layers.switched import SwitchedLinear
from ..rules import UpdateRule

_FALL = 0.3  # of the frequency, over descent_rate * total_steps steps


@method(
    "switchlora_adamw",
    paper="2406.06564",
    summary="SwitchLoRA: low-rank factors that trade vectors with candidates",
    state="2 r (m + n)",
    weights="m n + (r + m) (m + n)",
    conversion=Conversion.to_layers(SwitchedLinear, "offload"),
)
class SwitchLoRAAdamW(FactoredAdamW):
    """SwitchLoRA with AdamW; all other parameters get plain AdamW.

    The paper's learning rate is about 20 times a full-rank one.
    """

    layer_type: ClassVar[type[FactoredLinear]] = SwitchedLinear
    steps_together: ClassVar[bool] = True
    awaited: ClassVar[str] = "both of its factors are"
    own_keywords = (
        Keyword(
            "switch_interval",
            40.0,
            "i_0, steps in which a layer exchanges r vectors at first, at least 2 freeze_steps.",
        ),
        Keyword(
            "descent_rate",
            0.1,
            "rho, after which share of the run the frequency has fallen to 0.3.",
        ),
        Keyword(
            "freeze_steps",
            5,
            "steps for which the counterpart of an exchanged vector is held.",
        ),
        Keyword("total_steps", 10_000, "T, steps of the run."),
        Keyword("seed", 0, "of the draws."),
    )

    def _make_attributes(self) -> None:
        super()._make_attributes()
        self._counted: list[Link] = []

    def compose(self, group: Group) -> Composition:
        """AdamW, with a step count per vector for factors, and the checked schedule."""
        checks.integer("freeze_steps", group["freeze_steps"], low=0)
        low = max(1, 2 * group["freeze_steps"])
        checks.number("switch_interval", group["switch_interval"], low=low)
        checks.number("descent_rate", group["descent_rate"], low=0.0, low_open=True)
        checks.integer("total_steps", group["total_steps"], low=1)
        checks.integer("seed", group["seed"], low=0)
        return super().compose(group)

    def factor_rule(self, group: Group) -> UpdateRule:
        """Adam with a step count per vector."""
        return vector_adam_rule(group)

    def _patience(self, group: Group) -> float:
        return float(group["switch_interval"])

    def _kept_for_step(self) -> dict[int, str]:
        reason = "vectors are switched by its gradient, before the update"
        return {id(param): reason for link in self._links for param in link.factors()}

    def _before(self) -> None:
        self._counted = [link for link in self._links if self._is_due(link)]
        with self._frozen_rows(self._counted):
            pairs = zip(self._counted, self._waiting(self._counted), strict=True)
            switched = sum(self._switch(link, self._steps(link), held) for link, held in pairs)
        if switched:
            self._call_event_hooks(LayerEvent("switch", self._steps(self._counted[0]), switched))

    def _after(self) -> None:
        for link in self._counted:
            for param in link.factors():
                held_rows(self.state[param]["held"]).local.sub_(1).clamp_(min=0)
        self._counted = []

    def _is_due(self, link: Link) -> bool:
        """Whether both factors of the layer have a gradient in this step."""
        if self._events(link) > self._steps(link):
            return False
        # A parameter without a gradient takes no step, so its rows aren't switched.
        grads = [held_rows(param.grad) for param in link.factors() if param.grad is not None]
        if len(grads) < 2 or not link.group["skip_nonfinite"]:
            return len(grads) == 2
        known = [self._sound.get(id(param)) for param in link.factors()]
        if None not in known:
            return all(known)
        spread = [grad.processes for grad in grads]
        return all(finite([grad.local for grad in grads], lambda position: None, spread))

    def _waiting(self, links: Sequence[Link]) -> list[tuple[int, int]]:
        """Vectors that are held on each side of layers, in one reduction."""
        counts: list[list[int]] = [[0, 0] for _ in links]
        spread: dict[tuple[Processes, torch.device], list[tuple[int, int, Tensor]]] = {}
        for position, link in enumerate(links):
            for side, param in enumerate(link.factors()):
                held = held_rows(self.state[param]["held"], link.params[side])
                own = position, side, held.local.count_nonzero()
                spread.setdefault((held.processes, held.local.device), []).append(own)
        for (processes, _), found in spread.items():
            whole = processes.sum(torch.stack([count for _, _, count in found])).tolist()
            for (position, side, _), count in zip(found, whole, strict=True):
                counts[position][side] = int(count)
        return [(first, second) for first, second in counts]

    def _switch(self, link: Link, step: int, waiting: tuple[int, int]) -> bool:
        layer, group = link.layer, link.group
        assert isinstance(layer, SwitchedLinear)
        states = [self.state[param] for param in link.factors()]
        seed = link.seed(step)
        count = min(_draw(layer.rank / interval(group, step), seed), layer.spare)
        starts = (states[0]["switched"], states[0]["switched"] + layer.rank // 2)
        for side in (0, 1):
            # Neither window may reach held vectors, which precede the other's start.
            count = min(count, (starts[1 - side] - waiting[side] - starts[side]) % layer.rank)
        for side in (0, 1):
            other, of = states[1 - side], link.params[1 - side]
            states[side]["events"] = step + 1
            if count:
                first = starts[side] % layer.rank
                places = layer.switch(side, first, count, mix(seed, side))
                states[side]["switched"] = (states[side]["switched"] + count) % layer.rank
                for key in ("exp_avg", "exp_avg_sq", "row_steps"):
                    held_rows(other[key], of).put(places, 0)
                held_rows(other["held"], of).put(places, group["freeze_steps"])
        return count > 0


def interval(group: dict[str, Any], step: int) -> float:
    """Steps in which a layer switches r vectors, at step `step` (from 0)."""
    share = (step + 1) / (group["descent_rate"] * group["total_steps"])
    rate = max(_FALL**share, 1e-8)
    return float(group["switch_interval"] / rate)


def _draw(mean: float, seed: int) -> int:
    """A random integer with this mean, rounded down or up."""
    generator = torch.Generator().manual_seed(seed)
    share = float(torch.rand((), generator=generator))
    return math.floor(mean) + (share < mean % 1)
