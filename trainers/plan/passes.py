"""Forward and backward passes as a stated model: operations by formula, launches counted.

For T tokens, N entries of matrices that each token is multiplied with (the head among them, the
embedding not) and layers of attention with heads of together a numbers over sequences of s tokens:
2 N T + 2 s a T a layer forward (half of the scores, which are causal), twice that backward, and
once more forward where blocks are recomputed. Launches are operations of torch in both passes of
the model itself, run on fake tensors with one block and with two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..models import checkpoint_activations
from .fakes import blocks_of, faking
from .launches import FREE
from .ledger import Ledger
from .network import Blocks, Network, Source, place
from .trace import untraced


@dataclass(frozen=True)
class Passes:
    """A forward and a backward pass of a micro-batch.

    Attributes:
        flops: floating-point operations.
        moved: bytes of weights and gradients that are read or written at least.
        unit: what computes, one of `work.UNITS`.
        launches: of kernels.
        notes: what the numbers leave out.
    """

    flops: float
    moved: int
    unit: str
    launches: int
    notes: tuple[str, ...]


def passes_of(model: Network, source: Source, batch: int, sequence: int) -> Passes:
    """Those of a model on "meta", which is changed.

    Args:
        model: the whole model.
        source: what it was made from.
        batch: sequences.
        sequence: tokens of each.

    Raises:
        ValueError: it has no blocks.
    """
    blocks = blocks_of(model, source)
    network: Any = model.network
    embedding, head = network.get_input_embeddings(), network.get_output_embeddings()
    tied = embedding.weight is head.weight
    multiplied = sum(
        param.numel()
        for param in model.parameters()
        if param.dim() > 1 and (tied or param is not embedding.weight)
    )
    width, notes = _attention(source.config)
    tokens = batch * sequence
    forward = 2.0 * tokens * (multiplied + len(blocks.items) * sequence * width)
    held = sum(param.nbytes for param in model.parameters())
    times = 4 if source.checkpointing else 3
    unit = "bf16" if source.autocast or source.dtype.itemsize == 2 else _wide()
    launches = _launches(model, blocks, source, batch, sequence)
    return Passes(times * forward, times * held, unit, launches, notes)


def _wide() -> str:
    """What multiplies fp32 matrices: TF32 only where torch is told so."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "fp32"


def _attention(config: Any) -> tuple[int, tuple[str, ...]]:
    """Numbers of a token's queries in a layer; what can't be said of a model."""
    heads = getattr(config, "num_attention_heads", None)
    hidden = getattr(config, "hidden_size", None)
    notes = []
    width = 0
    if isinstance(heads, int) and isinstance(hidden, int):
        width = heads * (getattr(config, "head_dim", None) or hidden // heads)
    else:
        notes.append("attention's own products are left out: the configuration doesn't say them")
    if any(getattr(config, name, None) for name in ("num_experts_per_tok", "num_local_experts")):
        notes.append("each token is taken to pass all experts, which is more than it does")
    return width, tuple(notes)


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations that launch something."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.rpartition("::")[2]
        self.found += not (func.namespace == "prim" or func.is_view or name in FREE)
        return func(*args, **(kwargs or {}))


def _launches(model: Network, blocks: Blocks, source: Source, batch: int, sequence: int) -> int:
    """Of both passes of the whole model."""
    depth = len(blocks.items)
    run = min(depth, 2) if blocks.equal else depth
    with faking(FakeTensorMode()), Ledger(), untraced():
        with blocks.first(run):
            place(model, torch.device("cpu"))
            if source.checkpointing:
                checkpoint_activations(model.network)
            many = _counted(model, batch, sequence)
        if run == depth:
            return many
        with blocks.first(1):
            return many + (depth - 2) * (many - _counted(model, batch, sequence))


def _counted(model: nn.Module, batch: int, sequence: int) -> int:
    tokens = torch.zeros(batch, sequence, dtype=torch.int64)
    with _Counter() as counter, torch.enable_grad():
        model(tokens, tokens).backward()
    model.zero_grad()
    found: int = counter.found
    return found
