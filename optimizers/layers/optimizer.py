"""The classes that a method with factored layers derives from."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Self, Unpack, overload

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT
from torch.utils.hooks import RemovableHandle

from ..engine.composition import Composition
from ..engine.gradients import check_gradients
from ..engine.optimizer import LowRankOptimizer, no_autocast
from ..engine.options import CommonOptions, Group
from ..engine.parameters import label, names
from ..engine.rotation import Rotation
from ..engine.rule_factories import adam_rule
from ..rules import UpdateRule
from . import FactoredLinear
from .convert import factored_layers
from .events import EventHook, LayerEvent


@dataclass(frozen=True)
class Link:
    """A layer that an optimizer trains.

    Attributes:
        index: position among the model's factored layers, which seeds draw from.
        name: of the layer in its model.
        layer: the layer.
        group: options of its factors.
    """

    index: int
    name: str
    layer: FactoredLinear
    group: Group

    def factors(self) -> list[nn.Parameter]:
        """The trained parts, in the order of `FACTORS`."""
        return [getattr(self.layer, name) for name in self.layer.FACTORS]


class FactoredAdamW(LowRankOptimizer):
    """AdamW in torch's form on a converted model; `step` carries out what the method schedules.

    The layers are held beside the state, so a pickle or copy has none: `attach` links them again.
    """

    projects: ClassVar[bool] = False
    fixed_options: ClassVar[tuple[str, ...]] = ("capturable", "factors")
    #: Options that say after which steps there are events.
    event_options: ClassVar[tuple[str, ...]] = ()
    #: The layer that this optimizer trains.
    layer_type: ClassVar[type[FactoredLinear]]

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        own: dict[str, Any] | None = None,
        **options: Unpack[CommonOptions],
    ) -> None:
        """Makes the optimizer.

        Args:
            params: `param_groups(model)` of a converted model.
            lr: learning rate, float or 0-d tensor, read at each step.
            betas: decay rates of the moments.
            eps: added to sqrt(V) after bias correction.
            weight_decay: decoupled, before the update.
            own: the method's own options, set by subclasses.
            **options: see `CommonOptions`.

        Raises:
            ValueError: an option is unknown or out of range, or a parameter can't be optimized.
        """
        self._links: list[Link] = []
        self._event_hooks: dict[int, EventHook] = OrderedDict()
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, **(own or {})}, options)

    @classmethod
    def group_keys(cls) -> set[str]:
        """Group keys that `build` accepts and that mean nothing here."""
        return {"rank", "update_proj_gap"}

    def compose(self, group: Group) -> Composition:
        """The rules of factors, whose state counts events, and of the rest."""
        if group.get("factors"):
            return Composition(self.factor_rule(group), counters=("events", "refreshed_at"))
        return Composition(self.plain_rule(group))

    def factor_rule(self, group: Group) -> UpdateRule:
        """The rule of the factors."""
        return self.plain_rule(group)

    def plain_rule(self, group: Group) -> UpdateRule:
        """The rule of everything else."""
        return adam_rule(group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores a pickle or copy, without layers."""
        self.__dict__.setdefault("_links", [])
        self.__dict__.setdefault("_event_hooks", OrderedDict())
        super().__setstate__(state)

    # Layers

    def attach(self, model: nn.Module) -> Self:
        """Links the layers whose factors this optimizer trains; `build` does it by itself.

        Args:
            model: the model that the parameters are of, wrapped or not.

        Returns:
            The optimizer.

        Raises:
            ValueError: a factor is not among the model's, or a layer's factors are trained in part.
        """
        groups = {
            param: group
            for group in self.param_groups
            if group.get("factors")
            for param in group["params"]
        }
        links = []
        for index, (name, layer) in enumerate(factored_layers(model)):
            own = [getattr(layer, factor) for factor in layer.FACTORS]
            known = [param in groups for param in own]
            if not any(known):
                continue
            if not all(known) or not isinstance(layer, self.layer_type):
                raise ValueError(
                    f"{name} is a {type(layer).__name__} of which {sum(known)} of {len(own)} "
                    f"factors are trained: {type(self).__name__} accepts all of a "
                    f"{self.layer_type.__name__}'s"
                )
            links.append(Link(index, name, layer, groups[own[0]]))
        found = {param for link in links for param in link.factors()}
        for group in self.param_groups:
            for param, name_ in zip(group["params"], names(group), strict=True):
                if group.get("factors") and param not in found:
                    raise ValueError(
                        f"{label(name_, param)} is not a factor of a layer of this "
                        f"{type(model).__name__}: accepted is the model that the optimizer's "
                        "parameters are of"
                    )
        self._links = links
        return self

    def register_event_hook(self, hook: EventHook) -> RemovableHandle:
        """Calls `hook(event)` after each `LayerEvent`; hooks are not part of the state."""
        handle = RemovableHandle(self._event_hooks)
        self._event_hooks[handle.id] = hook
        return handle

    def _call_event_hooks(self, event: LayerEvent) -> None:
        for hook in tuple(self._event_hooks.values()):
            hook(event)

    # The step

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Takes one step, and what is scheduled before or after it.

        Raises:
            ValueError: a gradient is sparse, or the method schedules something and no layers are
                attached.
        """
        factors = [g for g in self.param_groups if g.get("factors") and g["params"]]
        if not self._links and any(self._needs_layers(group) for group in factors):
            raise ValueError(
                f"{type(self).__name__} has no layers, since it was copied, pickled or made by "
                "hand: accepted is attach(model) before the first step"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        check_gradients(self.param_groups)
        self._prepare()
        with no_autocast():
            self._before()
            super().step()
            self._after()
        return loss

    def _needs_layers(self, group: Group) -> bool:
        """Whether anything is scheduled for a group of factors, for which layers are attached."""
        return True

    def _before(self) -> None:
        """What is scheduled at a step's start, gradients being there."""

    def _after(self) -> None:
        """What is scheduled at a step's end."""

    def _due(self, gap: str) -> list[Link]:
        """Layers that have passed a multiple of group[gap] steps since their event before."""
        return [link for link in self._links if self._passed(link, gap) > self._events(link)]

    def _passed(self, link: Link, gap: str) -> int:
        """Multiples of group[gap] that a layer's steps have passed."""
        return self._steps(link) // int(link.group[gap])

    def _events_after(self, group: Group, steps: int) -> int:
        """How many events this many steps have behind them; 0 where none are counted."""
        gap = group[self.event_options[0]] if self.event_options else None
        return 0 if gap is None else steps // int(gap)

    def _options_changed(self, group: Group, before: Group) -> None:
        """With another gap the next event is at the next of its multiples."""
        if not group.get("factors") or all(group[k] == before.get(k) for k in self.event_options):
            return
        for param in group["params"]:
            state = self.state.get(param, {})
            if "events" in state:
                state["events"] = self._events_after(group, int(state["step"]))

    def _events(self, link: Link) -> int:
        return int(self.state[link.factors()[0]]["events"])

    def _steps(self, link: Link) -> int:
        return int(self.state[link.factors()[0]]["step"])

    def _renew(self, param: nn.Parameter, rule: UpdateRule) -> None:
        """Sets a factor's moments to zero; their bias corrections start anew."""
        state = self.state[param]
        rule.transport_moments(state, "reset", Rotation(None, None))
        state["refreshed_at"] = int(state["step"])
