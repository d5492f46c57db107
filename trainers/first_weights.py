"""First weights drawn one parameter at a time, as a whole model's initialisation draws them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowrank.optimizers import QuantizedWeight

_OVERWRITING = ("aten::normal_", "aten::uniform_", "aten::fill_", "aten::zero_")


@dataclass(frozen=True)
class _Write:
    """One operation that wrote a parameter's values.

    Attributes:
        random: the CPU generator's state before it.
        function: the operation.
        arguments: its positional arguments after the tensor.
        keywords: its keyword arguments.
        dtype: the parameter's dtype then.
    """

    random: Tensor
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]
    dtype: torch.dtype

    def repeat(self, tensor: Tensor) -> None:
        """Writes the same values again; torch's generator is left where it ends."""
        torch.set_rng_state(self.random)
        self.function(tensor, *self.arguments, **self.keywords)


class _Scratch:
    """One piece of memory for all draws.

    Of many, the C library would keep much between the generator's states, which stay.
    """

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor; it is valid until the next call."""
        size = torch.Size(shape).numel() * dtype.itemsize
        if self._bytes.numel() < size:
            self._bytes = torch.empty(0, dtype=torch.uint8)  # never two at once
            self._bytes = torch.empty(size, dtype=torch.uint8)
        return self._bytes[:size].view(dtype).view(tuple(shape))


class FirstWeights:
    """While it is entered, new parameters are on the meta device and what writes them is noted.

    Each operation is done to a tensor that is dropped at once, so that the generator goes on as in
    an initialisation of real parameters. `values` repeats the last ones of each parameter from the
    generator's state at the time: the values are the same to the bit, whatever order the model's
    initialisation has, and there is never more than one whole parameter in memory. Buffers are real
    from the start. Not noted is what torch itself leaves out on the meta device:
    `nn.init.trunc_normal_`, which LLaMA's initialisation doesn't use.
    """

    def __init__(self) -> None:
        self._named: dict[str, list[_Write]] = {}
        self._register: Any = None
        self._scratch = _Scratch()
        self._mode = _Notes(self._scratch)

    def __enter__(self) -> Self:
        self._register = register = nn.Module.register_parameter
        notes = self._mode

        def on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
            register(module, name, param)
            if param is not None and not param.is_meta:
                moved = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
                notes.follow(moved)
                module._parameters[name] = moved

        nn.Module.register_parameter = on_meta  # type: ignore[assignment, method-assign]
        self._mode.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._mode.__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        nn.Module.register_parameter = self._register  # type: ignore[method-assign]

    def name(self, network: nn.Module) -> None:
        """Remembers what was noted by the parameters' names; call it before parameters change.

        Raises:
            RuntimeError: a parameter got no values.
        """
        for name, parameter in network.named_parameters():
            self._named[name] = self._mode.writes(parameter)
            if not self._named[name]:
                raise RuntimeError(f"the model's initialisation gives {name} no values")

    def values(self, network: nn.Module) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
        """The first values of all parameters, one at a time; the generator is as before at the end.

        Args:
            network: as it was given to `name`; its parameters may be sharded or quantised since.

        Yields:
            Name, parameter and whole values. These are valid until the next ones are asked for.
        """
        after = torch.get_rng_state()
        for name, parameter in list(network.named_parameters()):
            writes = self._named[name]
            whole = self._scratch.take(parameter.shape, writes[0].dtype)
            for write in writes:
                write.repeat(whole)
            yield name, parameter, whole
        torch.set_rng_state(after)


@torch.no_grad()
def fill(
    network: nn.Module,
    values: Iterable[tuple[str, nn.Parameter, Tensor]],
    device: torch.device,
) -> None:
    """In place: gives parameters on the meta device memory and their values, one at a time.

    Args:
        network: its quantised weights are quantised as they are filled.
        values: name, parameter and whole value of each.
        device: of the parameters.
    """
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(id(parameter), []).append((module, name))
    for _, parameter, value in values:
        made = value.to(parameter.dtype, copy=True).to(device)
        if isinstance(parameter, QuantizedWeight):
            made = parameter.quantize(made, parameter.group_size)
        filled = nn.Parameter(made, parameter.requires_grad)
        for module, name in owners[id(parameter)]:
            setattr(module, name, filled)


class _Notes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what writes parameters on the meta device."""

    def __init__(self, scratch: _Scratch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._scratch = scratch
        # By storage, which `param.data` shares; numbers are unique only while objects exist.
        self._followed: dict[int, tuple[Tensor, Tensor]] = {}
        self._writes: dict[int, list[_Write]] = {}

    def follow(self, parameter: Tensor) -> None:
        """Notes what is written to a parameter from here on."""
        self._followed[_storage(parameter)] = parameter, parameter.detach()
        self._writes[id(parameter)] = []

    def writes(self, parameter: Tensor) -> list[_Write]:
        """What made a parameter's values, in order."""
        return self._writes.get(id(parameter), [])

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        keywords = kwargs or {}
        target = args[0] if args else None
        if isinstance(target, Tensor) and target.is_meta and func._schema.is_mutable:
            self._note(target, func, args[1:], keywords)
            return target
        return func(*args, **keywords)

    def _note(self, target: Tensor, func: Any, rest: tuple[Any, ...], named: Any) -> None:
        parameter, _ = self._followed.get(_storage(target), (target, target))
        before = self.writes(parameter)
        begins = func._schema.name in _OVERWRITING
        alone = not any(isinstance(item, Tensor) for item in tree_leaves((rest, named)))
        known = id(parameter) in self._writes and target.shape == parameter.shape
        if not (alone and known and (begins or before)):
            raise RuntimeError(
                f"the model's initialisation uses {func._schema.name} in a way that can't be"
                " repeated one parameter at a time: with another tensor, on a part of a parameter"
                " or on none, or where there are no values yet"
            )
        write = _Write(torch.get_rng_state(), func, rest, named, target.dtype)
        write.function(self._scratch.take(target.shape, target.dtype), *rest, **named)
        self._writes[id(parameter)] = [write] if begins else [*before, write]


def _storage(tensor: Tensor) -> int:
    number: int = tensor.untyped_storage()._cdata
    return number
