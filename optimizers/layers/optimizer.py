"""The base class of methods with factored layers."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from operator import is_
from typing import Any, ClassVar, Self, overload

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..engine.composition import Composition
from ..engine.copies import engine_groups
from ..engine.optimizer import LowRankOptimizer, out_of_dynamo
from ..engine.options import Group
from ..engine.parameters import label, names
from ..engine.plan import Plan
from ..engine.rotation import Rotation
from ..engine.rule_families import TORCH_ADAMW
from ..engine.sharding import shard_of
from ..engine.warn import warn_user
from ..rules import UpdateRule
from . import FactoredLinear
from .base import FACTOR
from .events import EventHook, LayerEvent
from .link import Link
from .partitioned import PartitionedLayers
from .replicas import check_buffers
from .seeds import named_layers


class FactoredAdamW(LowRankOptimizer):
    """AdamW in torch's form on a converted model; `step` runs the scheduled events of the layers.

    The layers are not part of the state, so a pickle or copy has none: `attach` links them again.
    """

    projects: ClassVar[bool] = False
    fixed_options: ClassVar[tuple[str, ...]] = ("capturable", "factors")
    rule = TORCH_ADAMW.but(weight_decay=0.0, capturable=False)
    #: Options that determine the steps of events.
    event_options: ClassVar[tuple[str, ...]] = ()
    #: The layer that this optimizer trains.
    layer_type: ClassVar[type[FactoredLinear]]
    #: Whether events before a step need all factors of a layer to take it together.
    steps_together: ClassVar[bool] = False
    #: Which factors have to be trained for a layer's events, for messages.
    awaited: ClassVar[str] = "one of its factors is"

    def _make_attributes(self) -> None:
        super()._make_attributes()
        self._links: list[Link] = []
        self._all_stepped = self._compared = False
        self._replaced: list[tuple[Tensor, Tensor]] = []
        self._cut: PartitionedLayers | None = None
        self._event_hooks: dict[int, EventHook] = OrderedDict()

    def _warn_of_groups(self) -> None:
        groups = self.param_groups
        if any(group.get("factors") for group in groups):
            return
        idle = "nothing happens to layers"
        if not self._needs_layers(groups[0]):
            if any(FACTOR in vars(param) for group in groups for param in group["params"]):
                return  # plain AdamW is what they need
            idle = "this is AdamW on the parameters as they are"
        warnings.warn(
            f"{type(self).__name__}: no parameter group has factors=True, so {idle}; "
            "param_groups(model) of a converted model, convert(name, model), makes groups that "
            "have it",
            stacklevel=3,
        )

    @classmethod
    def group_keys(cls) -> set[str]:
        """Group keys that `build` accepts and that have no effect here."""
        return {"rank", "update_proj_gap"}

    @classmethod
    def _place_of(cls, name: str, shown: str) -> str:
        return f"accepted is convert(name, model, {shown}) or build(name, model, {shown})"

    def compose(self, group: Group) -> Composition:
        """The rule of factors, with counters of events, or of other parameters."""
        if group.get("factors"):
            return Composition(self.factor_rule(group), counters=("events", "refreshed_at"))
        return Composition(self.plain_rule(group))

    def factor_rule(self, group: Group) -> UpdateRule:
        """The rule of the factors."""
        return self.plain_rule(group)

    def plain_rule(self, group: Group) -> UpdateRule:
        """The rule of all other parameters."""
        return self.rule.make(group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores a pickle or copy, without layers."""
        self.__dict__.setdefault("_links", [])
        self.__dict__.setdefault("_all_stepped", False)
        self.__dict__.setdefault("_compared", False)
        self.__dict__.setdefault("_replaced", [])
        self.__dict__.setdefault("_cut", None)
        self.__dict__.setdefault("_event_hooks", OrderedDict())
        super().__setstate__(state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `LowRankOptimizer.load_state_dict`; layers stay attached."""
        super().load_state_dict(state_dict)
        self._relink()  # torch replaces the groups by new ones

    # Layers

    def attach(self, model: nn.Module) -> Self:
        """Links the layers whose factors this optimizer trains; `build` calls it.

        Args:
            model: the model of the parameters, wrapped or not.

        Returns:
            The optimizer.

        Raises:
            ValueError: a factor is not the model's, or in a group without `factors`, or only a part
                of a layer's factors is trained.
        """
        groups = self._owners()
        links, untrained = [], []
        for name, layer in named_layers(model):
            if not isinstance(layer, FactoredLinear):
                continue
            own = [self._held(getattr(layer, factor)) for factor in layer.FACTORS]
            for factor, param in zip(layer.FACTORS, own, strict=True):
                group = groups.get(param)
                if group is not None and not group.get("factors") and self._needs_layers(group):
                    raise ValueError(
                        f"{name}.{factor} is in a parameter group without factors=True, in which "
                        "nothing would happen to its layer: accepted are the groups that "
                        "param_groups(model) makes"
                    )
            known = [param in groups for param in own]
            if not any(known):
                untrained.append(name)
                continue
            if not all(known) or not isinstance(layer, self.layer_type):
                raise ValueError(
                    f"{name} is a {type(layer).__name__} of which {sum(known)} of {len(own)} "
                    f"factors are trained: {type(self).__name__} accepts all of a "
                    f"{self.layer_type.__name__}'s"
                )
            links.append(Link(name, layer, groups[own[0]], tuple(own)))
        found = {param for link in links for param in link.factors()}
        for group in self._present_groups():
            for param, name_ in zip(group["params"], names(group), strict=True):
                if group.get("factors") and param not in found:
                    raise ValueError(
                        f"{label(name_, param)} is not a factor of a layer of this "
                        f"{type(model).__name__}: accepted is the model that the optimizer's "
                        "parameters are of"
                    )
        if untrained and self._needs_layers(links[0].group if links else self.param_groups[0]):
            warnings.warn(
                f"{type(self).__name__} trains no factor of {', '.join(untrained)}, so nothing "
                "happens to them: their factors were frozen, or in no parameter group",
                stacklevel=2,
            )
        self._links, self._all_stepped, self._compared = links, False, False
        self._cut = None
        return self

    def _held(self, param: Tensor) -> Tensor:
        """What the optimizer has in the place of a model's parameter."""
        return param if self._partitions is None else self._partitions.blocks.get(param, param)

    def _present_groups(self) -> Sequence[Group]:
        """The groups as they are during a step."""
        return self.param_groups if self._partitions is None else self._partitions.groups

    def _owners(self) -> dict[Tensor, Group]:
        groups = self._present_groups()
        return {param: group for group in groups for param in group["params"]}

    def _relink(self) -> None:
        """Gives links the parameters and groups that a step sees."""
        owners = self._owners()
        for position, link in enumerate(self._links):
            params = tuple(self._held(param) for param in link.params)
            self._links[position] = replace(link, params=params, group=owners[params[0]])

    def _adopted(self) -> None:
        self._relink()

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

    @out_of_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Takes one step, with the events before and after it.

        Raises:
            ValueError: a gradient is sparse, or there are scheduled events and no layers are
                attached, or their parameters are not the optimizer's.
            RuntimeError: in the first step, if what FSDP2 or ZeRO leaves whole differs between
                processes.
        """
        self._check_before_updates()
        loss = super().step(closure)
        waiting = self._cut is not None and self._cut.waiting
        if not (self._all_stepped or waiting):
            self._look_for_idle_factors()
        return loss

    def _check_model(self) -> None:
        """Nothing yet: `_advance` first follows the layers."""

    def _advance(self, plans: Sequence[Plan]) -> None:
        if self._partitions is None:
            self._follow_layers()
            super()._check_model()
        self._compare_buffers()
        with self._complete_layers():
            try:
                self._before()
                # Hooks may have changed options.
                again = self._prepare()
                try:
                    super()._advance(again)
                finally:
                    for plan in again:
                        plan.release()
            finally:
                for param, grad in self._replaced:
                    param.grad = grad
                self._replaced = []
            self._after()

    def _compare_buffers(self) -> None:
        """In the first step compares what all processes have whole."""
        if not self._compared:
            if self._partitions is not None:
                group = self._partitions.processes.group
            else:
                group = next(iter(engine_groups(self.param_groups)), None)
            check_buffers([(link.name, link.layer) for link in self._links], group)
            self._compared = True

    @contextmanager
    def _complete_layers(self) -> Iterator[None]:
        """Under ZeRO leaves only layers all of whose factors step now, or have stepped already."""
        if self._partitions is None:
            yield
            return
        if self._cut is None:
            self._cut = PartitionedLayers(
                self._links, self._partitions, steps_together=self.steps_together
            )
        all_links = self._links
        self._links = self._cut.complete(all_links)
        try:
            with self._cut.shown(self._links):
                yield
        finally:
            self._links = all_links

    def _frozen_rows(self, links: Sequence[Link]) -> AbstractContextManager[None]:
        """While layers' frozen weights are read and written."""
        return nullcontext() if self._cut is None else self._cut.frozen_rows(links)

    def _check_before_updates(self) -> None:
        factors = [g for g in self.param_groups if g.get("factors") and g["params"]]
        if not self._links and any(self._needs_layers(group) for group in factors):
            raise ValueError(
                f"{type(self).__name__} has no layers, since it was copied, pickled or made by "
                "hand: accepted is attach(model) before the first step"
            )

    def _follow_layers(self) -> None:
        """Takes over parameters that were exchanged, in the layers and in the groups."""
        for position, link in enumerate(self._links):
            now = link.present()
            if all(map(is_, now, link.params)):
                continue
            lost = [n for n, p in zip(link.layer.FACTORS, now, strict=True) if p not in self.state]
            if lost:
                raise ValueError(
                    f"{link.name}.{lost[0]} is another parameter than this optimizer was made for: "
                    "accepted is build(name, model) after fully_shard(model), and a step after a "
                    "backward pass, which leaves parameters sharded (so does model.reshard())"
                )
            self._links[position] = replace(link, params=now)

    def _replace_gradient(self, param: Tensor, grad: Tensor) -> None:
        """Uses another gradient for this step; the user's is restored after it."""
        assert param.grad is not None
        self._sound.pop(id(param), None)
        self._replaced.append((param, param.grad))
        param.grad = grad

    def _needs_layers(self, group: Group) -> bool:
        """Whether a group of factors has scheduled events, which need attached layers."""
        return True

    def _before(self) -> None:
        """Runs the events before a step, when gradients are available."""

    def _after(self) -> None:
        """Runs the events after a step."""

    def _patience(self, group: Group) -> float:
        """Steps after which each layer of a group should have had an event."""
        return float(group["update_proj_gap"])

    def _look_for_idle_factors(self) -> None:
        """Warns once of factors that had no step when events should have begun."""
        idle = {
            f"{link.name}.{factor}": link
            for link in self._links
            for factor, param in zip(link.layer.FACTORS, link.factors(), strict=True)
            if not int(self.state[param]["step"])
        }
        idle = {name: link for name, link in idle.items() if self._needs_layers(link.group)}
        if idle:
            # Engines may have entries of their own in the state.
            steps = max(int(state.get("step", 0)) for state in self.state.values())
            if steps < min(self._patience(link.group) for link in idle.values()):
                return
            warn_user(
                f"{type(self).__name__} has taken {steps} steps without a finite gradient for "
                f"{', '.join(idle)}: what is scheduled for a layer waits until {self.awaited} "
                "trained (convert(..., patterns=...) leaves layers out)"
            )
        self._all_stepped = True

    def _due(self, gap: str) -> list[Link]:
        """Layers whose steps have passed a multiple of group[gap] since their last event."""
        return [link for link in self._links if self._passed(link, gap) > self._events(link)]

    def _passed(self, link: Link, gap: str) -> int:
        """Number of multiples of group[gap] that a layer's steps have passed."""
        return self._steps(link) // int(link.group[gap])

    def _events_after(self, group: Group, steps: int) -> int:
        """Number of events in this many steps; 0 if events are not counted."""
        gap = group[self.event_options[0]] if self.event_options else None
        return 0 if gap is None else steps // int(gap)

    def _options_changed(self, group: Group, before: Group) -> None:
        """After a change of the gap the next event is at its next multiple."""
        if not group.get("factors") or all(group[k] == before.get(k) for k in self.event_options):
            return
        for param in group["params"]:
            state = self.state.get(param, {})
            if "events" in state:
                state["events"] = self._events_after(group, int(state["step"]))

    def _events(self, link: Link) -> int:
        return self._largest(link, "events")

    def _steps(self, link: Link) -> int:
        """Steps of a layer: the largest step count of its factors."""
        return self._largest(link, "step")

    def _largest(self, link: Link, key: str) -> int:
        # State that is missing is made by the next step.
        return max(int(self.state.get(param, {}).get(key, 0)) for param in link.factors())

    def _renew(self, param: Tensor, rule: UpdateRule) -> None:
        """Resets a factor's moments and their bias corrections."""
        state = shard_of(param).local_state(self.state[param], None)
        rule.transport_moments(state, "reset", Rotation(None, None))
        state["refreshed_at"] = int(state["step"])
