"""First weights drawn one parameter at a time, as a whole model's initialisation draws them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_OVERWRITING = ("aten::normal_", "aten::uniform_", "aten::fill_", "aten::zero_")


@dataclass(frozen=True)
class _Fill:
    """One operation that gave a parameter all its values.

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
    """While it is entered, new parameters are on the meta device and their fills are noted.

    Each random fill is drawn into a tensor that is dropped at once, so that the generator goes on
    as in an initialisation of real parameters. `draw` repeats the last fill of each parameter from
    the generator's state at the time: the values are the same to the bit, whatever order the
    model's initialisation has, and there is never more than one whole parameter in memory. Buffers
    are real from the start.
    """

    def __init__(self) -> None:
        self._fills: dict[int, _Fill] = {}
        # Numbers of objects are unique only while the objects exist.
        self._parameters: list[Tensor] = []
        self._named: dict[str, _Fill] = {}
        self._register: Any = None
        self._scratch = _Scratch()
        self._mode = _Notes(self._fills, self._scratch)

    def __enter__(self) -> Self:
        self._register = register = nn.Module.register_parameter
        parameters = self._parameters

        def on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
            register(module, name, param)
            if param is not None and not param.is_meta:
                moved = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
                parameters.append(moved)
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
        """Remembers the fills by their parameters' names; call it before parameters change.

        Raises:
            RuntimeError: a parameter got no values.
        """
        for name, parameter in network.named_parameters():
            if id(parameter) not in self._fills:
                raise RuntimeError(f"the model's initialisation gives {name} no values")
            self._named[name] = self._fills[id(parameter)]

    def draw(self, network: nn.Module, part: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Fills all parameters.

        Args:
            network: as it was given to `name`, its parameters sharded or not since then.
            part: takes the whole values and the parameter, and gives the parameter's own.
        """
        after = torch.get_rng_state()
        for name, parameter in network.named_parameters():
            fill = self._named[name]
            torch.set_rng_state(fill.random)
            whole = self._scratch.take(parameter.shape, fill.dtype)
            fill.function(whole, *fill.arguments, **fill.keywords)
            target = parameter.detach()
            target = target.to_local() if hasattr(target, "to_local") else target
            target.copy_(part(whole, parameter))
        torch.set_rng_state(after)


class _Notes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what fills tensors on the meta device."""

    def __init__(self, fills: dict[int, _Fill], scratch: _Scratch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._fills, self._scratch = fills, scratch

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
            if func._schema.name not in _OVERWRITING:
                raise RuntimeError(
                    f"the model's initialisation uses {func._schema.name}, which can't be repeated"
                    " for a part of a parameter; train it without distributed.strategy=fsdp2"
                )
            random = torch.get_rng_state()
            drawn = self._scratch.take(target.shape, target.dtype)
            func(drawn, *args[1:], **keywords)
            self._fills[id(target)] = _Fill(random, func, args[1:], keywords, target.dtype)
            return target
        return func(*args, **keywords)
