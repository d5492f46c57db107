"""Runs an operation and its reference on the same inputs, and compares what both wrote.

Outputs are poisoned before, and the entries around them are checked afterwards: nothing is left out
or written beyond.
"""

from __future__ import annotations

from typing import Any

import torch
from draws import Draw
from outputs import Output, patterns
from torch import Tensor

from lowrank.cuda import ops


def run(
    d: Draw, name: str, arguments: list[Any], written: list[int], keeps: bool = False
) -> list[tuple[Tensor, Tensor]]:
    """Calls an operation and its reference; returns (compiled, reference) of what was written.

    Args:
        d: draws how outputs are aligned.
        name: of the operation.
        arguments: its arguments; tensors at `written` give shapes and types of outputs.
        written: positions of output tensors or lists of them.
        keeps: outputs are inputs as well.
    """
    offset = d.integer(0, 3)
    outputs: list[Output] = []

    def place(tensor: Tensor) -> Tensor:
        output = Output(tensor, offset)
        if keeps:
            output.inside.copy_(tensor)
        outputs.append(output)
        return output.inside

    compiled, reference = list(arguments), list(arguments)
    for at in written:
        value = arguments[at]
        if isinstance(value, list):
            compiled[at] = [place(t) for t in value]
            reference[at] = [t.clone() for t in value]
        elif value is not None:
            compiled[at], reference[at] = place(value), value.clone()
    _, plain, kernel = ops.OPERATIONS[name]
    if d.plain:
        plain(*compiled)
    else:
        assert kernel(*compiled), f"{name} was left to the reference"
    if d.reference is not None:
        reference = [_moved(value, d.reference) for value in reference]
    with d.around():
        plain(*reference)
    pairs: list[tuple[Tensor, Tensor]] = []
    for at in written:
        if isinstance(compiled[at], list):
            pairs += zip(compiled[at], reference[at], strict=True)
        elif compiled[at] is not None:
            pairs.append((compiled[at], reference[at]))
    for output in outputs:
        output.check_margins()
    if d.reference is not None:
        pairs = [(ours, theirs.to(ours.device)) for ours, theirs in pairs]
    return pairs


def _moved(value: Any, device: torch.device) -> Any:
    """A tensor, or a list of them, on another device; all else as it is."""
    if isinstance(value, list):
        return [_moved(entry, device) for entry in value]
    return value.to(device) if isinstance(value, Tensor) else value


def exactly(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """All entries have the same bits, signs of zeros included; NaN is NaN."""
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(patterns(ours), patterns(theirs))
