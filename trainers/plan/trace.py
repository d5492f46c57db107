"""Memory of a forward and a backward pass, from a run on fake tensors with few blocks."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor

from .early import InBackward, Sum
from .ledger import Ledger
from .network import Blocks, Network

#: What fake tensors raise where they don't suffice.
_UNPLANNED = (
    fake_tensor.DataDependentOutputException,
    fake_tensor.DynamicOutputShapeException,
    fake_tensor.UnsupportedOperatorException,
)
#: Blocks that are run; the middle one stands for all others.
RUN = 3
GRADIENTS, ACTIVATIONS, LOGITS = "gradients", "activations", "logits"
Bytes = Counter[str]


@dataclass(frozen=True)
class Span:
    """Bytes by category in a part of a pass: at its begin, at its end, and at the peak between."""

    begin: Bytes
    end: Bytes
    peak: Bytes

    def shifted(self, by: Bytes) -> Span:
        """The same part above other bytes."""
        return Span(*(_sum(level, by) for level in (self.begin, self.end, self.peak)))

    def onward(self, first: Span, ratio: float) -> Span:
        """This part as it goes on from another one: by `ratio` times their difference."""

        def on(here: Bytes, there: Bytes) -> Bytes:
            return Counter(
                {name: here[name] + round(ratio * (here[name] - there[name])) for name in here}
            )

        return Span(on(self.begin, first.begin), on(self.end, first.end), on(self.peak, first.peak))


@dataclass(frozen=True)
class Pass:
    """Whole passes, one or several: their parts in order, those of the blocks by their numbers.

    Attributes:
        spans: name and bytes of each part.
    """

    spans: tuple[tuple[str, Span], ...]

    @property
    def peak(self) -> Bytes:
        """Bytes by category at the highest moment."""
        return max((span.peak for _, span in self.spans), key=Counter.total)

    @property
    def end(self) -> Bytes:
        """Bytes that remain."""
        return self.spans[-1][1].end

    def then(self, following: Pass) -> Pass:
        """This one and another one after it."""
        return Pass(self.spans + following.spans)

    def onward(self, first: Pass, ratio: float) -> Pass:
        """See `Trace.onward`."""
        pairs = zip(self.spans, first.spans, strict=True)
        return Pass(tuple((name, span.onward(own, ratio)) for (name, span), (_, own) in pairs))


@dataclass(frozen=True)
class Trace:
    """What a micro-batch takes beside weights and state, or those of a step that differ.

    Attributes:
        forward: the passes that compute the loss.
        backward: the passes that leave gradients.
    """

    forward: Pass
    backward: Pass

    def onward(self, first: Trace, ratio: float) -> Trace:
        """A larger micro-batch's: bytes grow in proportion, once the loss works in chunks."""
        return Trace(
            self.forward.onward(first.forward, ratio), self.backward.onward(first.backward, ratio)
        )


def _sum(first: Bytes, second: Bytes, factor: int = 1) -> Bytes:
    total = Counter(first)
    for name, value in second.items():
        total[name] += factor * value
    return total


class _Recorder:
    """Marks the borders between blocks while the model runs."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._begin = Counter(ledger.now.parts)
        self._name = "first"
        self.spans: list[tuple[str, Span]] = []
        ledger.restart()

    def mark(self, following: str) -> None:
        """Ends a part and begins another one."""
        ledger, end = self._ledger, Counter(self._ledger.now.parts)
        self.spans.append((self._name, Span(self._begin, end, Counter(ledger.peak.parts))))
        self._begin, self._name = end, following
        ledger.restart()


class _Tracer:
    def __init__(self, ledger: Ledger, in_backward: InBackward) -> None:
        self._ledger = ledger
        self._in_backward = in_backward
        self._sums: dict[int, Tensor] = {}
        self._last = False
        self._forward: _Recorder | None = None
        self._backward: _Recorder | None = None

    def run(
        self,
        model: nn.Module,
        blocks: tuple[nn.Module, ...],
        batch: int,
        sequence: int,
        *,
        last: bool,
    ) -> tuple[list[tuple[str, Span]], list[tuple[str, Span]]]:
        self._last = last
        ledger = self._ledger
        device = next(model.parameters()).device
        with contextlib.ExitStack() as stack:
            for number, block in enumerate(blocks):
                handle = block.register_forward_pre_hook(self._before(number), with_kwargs=True)
                stack.callback(handle.remove)
            stack.callback(blocks[-1].register_forward_hook(self._after).remove)
            for param in model.parameters():
                if param.requires_grad:
                    handle = param.register_post_accumulate_grad_hook(self._own)  # type: ignore[no-untyped-call]
                    stack.callback(handle.remove)
            ledger.category = ACTIVATIONS
            tokens = torch.zeros(batch, sequence, dtype=torch.int64, device=device)
            self._forward = _Recorder(ledger)
            loss = model(tokens, tokens)
            self._forward.mark("")
            forward, self._forward = self._forward.spans, None
            ledger.category = LOGITS
            self._backward = _Recorder(ledger)
            (loss * 1.0).backward()
            del loss
            self._backward.mark("")
        return forward, self._backward.spans

    def _before(self, number: int) -> Any:
        def mark(module: nn.Module, args: Any, kwargs: Any) -> None:
            if self._forward is not None:
                hidden = args[0] if args else kwargs["hidden_states"]
                self._forward.mark(str(number))
                after = str(number - 1) if number else "last"
                hidden.register_hook(lambda _: self._backward_mark(after))

        return mark

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._forward is not None:
            self._forward.mark("last")
            self._ledger.category = LOGITS
            hidden = output[0] if isinstance(output, tuple) else output
            hidden.register_hook(lambda _: self._backward_mark("top"))

    def _backward_mark(self, following: str) -> None:
        if self._backward is not None:
            self._ledger.category = ACTIVATIONS
            self._backward.mark(following)

    def _own(self, param: Tensor) -> None:
        if param.grad is not None:
            self._ledger.move(param.grad, GRADIENTS)
        known = self._in_backward
        total, added = known.sums.get(id(param)), known.scratch.get(id(param))
        if total is not None:
            if id(param) not in self._sums:
                self._ledger.rise(known.fits.get(id(param), 0), "scratch")
            self._add(param, total)
            added = total.update
        if self._last and added is not None:
            self._ledger.rise(added, "scratch")
            param.grad = None
            self._sums.pop(id(param), None)

    def _add(self, param: Tensor, total: Sum) -> None:
        """Keeps a gradient's projection in its place."""
        self._ledger.rise(total.projecting, "scratch")
        param.grad = None
        if id(param) not in self._sums:
            self._keep_sum(param, total)

    def _keep_sum(self, param: Tensor, total: Sum) -> None:
        kept = torch.empty(total.kept, dtype=torch.uint8, device=param.device)
        self._ledger.move(kept, GRADIENTS)
        self._sums[id(param)] = kept

    def keep(self, module: nn.Module) -> int:
        """Makes what earlier passes have kept of a module's parameters; its bytes."""
        ledger = self._ledger
        before, ledger.category = ledger.now.total, GRADIENTS
        for param in module.parameters():
            total = self._in_backward.sums.get(id(param))
            if total is not None:
                if id(param) not in self._sums:
                    self._keep_sum(param, total)
            elif param.requires_grad and param.grad is None:
                param.grad = torch.empty(param.shape, dtype=param.dtype, device=param.device)
        return ledger.now.total - before


def trace(
    model: Network,
    blocks: Blocks,
    batch: int,
    sequence: int,
    *,
    depth: int,
    kept: int,
    earlier: bool,
    granularity: int,
    in_backward: InBackward | None = None,
) -> Trace:
    """Runs micro-batches of a model of fake tensors, and scales its blocks up to its depth.

    Call it under `FakeTensorMode`; the model is left without gradients.

    Args:
        model: the model, or one with fewer blocks.
        blocks: its blocks; if they are unequal, all are run.
        batch: sequences.
        sequence: tokens of each.
        granularity: bytes to which the allocator rounds up.
        depth: blocks of the whole model.
        kept: bytes of all gradients, if they are there before the last micro-batch, else 0.
        earlier: whether there are micro-batches before it, of which layers may keep more.
        in_backward: what becomes of gradients in the passes of a step; None for nothing.

    Raises:
        ValueError: what the model computes depends on the numbers that it computes with.
    """
    run = min(depth, RUN) if blocks.equal else depth
    ledger = Ledger(granularity)
    with blocks.first(run), ledger, untraced():
        held = [*model.parameters(), *model.buffers()]
        ledger.hold(held, "weights")
        try:
            tracer = _Tracer(ledger, in_backward or InBackward())
            if in_backward is not None and not in_backward.begins:
                inside = sum(tracer.keep(block) for block in blocks.items[:run])
                kept = inside * depth // run + tracer.keep(model)
            passes = (2 if kept else 1) if in_backward is None else in_backward.passes
            runs = [
                tracer.run(model, blocks.items[:run], batch, sequence, last=number == passes)
                for number in range(1, passes + 1)
            ]
        except _UNPLANNED as error:
            raise ValueError(
                f"{type(model.network).__name__} computes what depends on its numbers, which a "
                f"plan has none of ({type(error).__name__}: {str(error).splitlines()[0][:120]})"
            ) from None
        finally:
            for param in model.parameters():
                param.grad = None
    missing = {} if run == depth else {str(run // 2): depth - run}
    found, at = Trace(Pass(()), Pass(())), Counter({GRADIENTS: kept})
    if in_backward is None and earlier:
        for spans in runs[0]:
            _, at = _grown(spans, missing, at)
        at[GRADIENTS] = kept
    for forward, backward in runs[-1:] if in_backward is None else runs:
        first, at = _grown(forward, missing, at)
        second, at = _grown(backward, missing, at)
        found = Trace(found.forward.then(first), found.backward.then(second))
    return found


def _grown(
    spans: list[tuple[str, Span]], missing: dict[str, int], start: Bytes
) -> tuple[Pass, Bytes]:
    """A pass with parts repeated that stand for several, above what there is at its begin."""
    made: list[tuple[str, Span]] = []
    at = start
    for name, span in spans:
        for _ in range(1 + missing.get(name, 0)):
            moved = span.shifted(_sum(at, span.begin, -1))
            made.append((name, moved))
            at = moved.end
    return Pass(tuple(made)), at


@contextlib.contextmanager
def untraced() -> Iterator[None]:
    """Lets transformers ask whether sequences are packed, as it does with real tensors.

    For fake ones it would assume so, and attention would need a mask.
    """
    from transformers import masking_utils

    if not hasattr(masking_utils, "is_tracing"):
        yield
        return
    with mock.patch.object(masking_utils, "is_tracing", return_value=False):
        yield
