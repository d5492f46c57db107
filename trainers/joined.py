"""Several optimizers, each of some of a model's parameters, as the one that a run has."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import islice
from typing import Any

from torch import Tensor

#: Key of a saved object's fields; its class is the one that the optimizer makes again.
FIELDS = "fields of"


class Handles:
    """Removes hooks of several optimizers."""

    def __init__(self, handles: Sequence[Any]) -> None:
        self._stack = ExitStack()
        for handle in handles:
            self._stack.callback(handle.remove)

    def remove(self) -> None:
        """Removes them all."""
        self._stack.close()


class JoinedOptimizer:
    """Optimizers of disjoint parameters that step together.

    It has what the trainer uses of a `torch.optim.Optimizer`. Python objects in their state, which
    official packages keep their projection matrices in, are saved as plain mappings of their
    fields, so that checkpoints load with ``weights_only=True``.

    Args:
        parts: the optimizers; their parameters are numbered in this order.
        make: by key of state, makes an object of the class that a part keeps there.
    """

    def __init__(
        self, parts: Sequence[Any], make: Mapping[str, Callable[[], Any]] | None = None
    ) -> None:
        self.parts = tuple(parts)
        self._make = dict(make or {})

    def with_part(self, part: Any) -> JoinedOptimizer:
        """These parts and one more."""
        return JoinedOptimizer([*self.parts, part], self._make)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all parts; the same mappings, so that a rate set here acts there."""
        return [group for part in self.parts for group in part.param_groups]

    @property
    def state(self) -> dict[Any, dict[str, Any]]:
        """The state of each parameter; tensors inside an object count as its basis."""
        return {
            param: dict(_entries(state))
            for part in self.parts
            for param, state in part.state.items()
        }

    @property
    def skipped(self) -> int:
        """Updates that were left out because a gradient was not finite."""
        return sum(int(getattr(part, "skipped", 0)) for part in self.parts)

    def step(self) -> None:
        """Steps every part."""
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=set_to_none)

    def register_refresh_hook(self, hook: Callable[[Any], None]) -> Handles:
        """Has the parts that tell of refreshes tell `hook`."""
        return self._register("register_refresh_hook", hook)

    def register_event_hook(self, hook: Callable[[Any], None]) -> Handles:
        """Has the parts that change layers tell `hook` of it."""
        return self._register("register_event_hook", hook)

    def _register(self, name: str, hook: Callable[[Any], None]) -> Handles:
        able = [part for part in self.parts if hasattr(part, name)]
        return Handles([getattr(part, name)(hook) for part in able])

    def state_dict(self) -> dict[str, Any]:
        """The states of all parts in the layout of `torch.optim`."""
        state: dict[Any, Any] = {}
        groups: list[dict[str, Any]] = []
        counts = []
        first = 0
        for part in self.parts:
            saved = part.state_dict()
            state |= {first + key: _plain(entries) for key, entries in saved["state"].items()}
            groups += [
                {**group, "params": [first + key for key in group["params"]]}
                for group in saved["param_groups"]
            ]
            counts.append(len(saved["param_groups"]))
            first += sum(len(group["params"]) for group in saved["param_groups"])
        return {"state": state, "param_groups": groups, "groups_of_parts": counts}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Loads what `state_dict` gave.

        Raises:
            ValueError: it is of other parts.
        """
        counts = [len(part.param_groups) for part in self.parts]
        if list(saved.get("groups_of_parts", ())) != counts:
            raise ValueError(
                f"the saved optimizer has parts of {saved.get('groups_of_parts')} groups; accepted:"
                f" {counts}"
            )
        groups = iter(saved["param_groups"])
        for part, count in zip(self.parts, counts, strict=True):
            own = list(islice(groups, count))
            keys = [key for group in own for key in group["params"]]
            part.load_state_dict(
                {
                    "state": {
                        key: self._restored(saved["state"][key])
                        for key in keys
                        if key in saved["state"]
                    },
                    "param_groups": own,
                }
            )

    def _restored(self, entries: Mapping[str, Any]) -> dict[str, Any]:
        restored: dict[str, Any] = {}
        for key, value in entries.items():
            if isinstance(value, Mapping) and FIELDS in value:
                made = self._make[key]()
                vars(made).update(value[FIELDS])
                value = made
            restored[key] = value
        return restored


def _entries(state: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in state.items():
        if not _is_object(value):
            yield key, value
            continue
        for name, field in vars(value).items():
            tensors = field if isinstance(field, list | tuple) else [field]
            for number, tensor in enumerate(tensors):
                if isinstance(tensor, Tensor):
                    yield f"basis_{key}_{name}_{number}", tensor


def _plain(entries: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: {FIELDS: dict(vars(value))} if _is_object(value) else value
        for key, value in entries.items()
    }


def _is_object(value: Any) -> bool:
    """Whether a value of a state is of a class of the package's own."""
    plain = value is None or isinstance(value, Tensor | int | float | str | list | tuple | dict)
    return not plain and hasattr(value, "__dict__")
