"""The numbers of a plan: the run's own code on fake tensors, each part once."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lowrank.cuda.library import assuming_libraries
from lowrank.optimizers import (
    FactoredAdamW,
    LowRankOptimizer,
    build,
    expected_state_bytes,
)

from ..memory import held_bytes
from ..models import checkpoint_activations
from .driverless import driverless
from .ledger import Ledger
from .network import Blocks, Network, Source, find_blocks, new_network, place
from .result import CATEGORIES
from .sharded import Parts, divided, wire_bytes
from .trace import GRADIENTS, InBackward, Trace, trace
from .update import Update, empty_gradients, simulate

#: Bytes to a multiple of which torch's allocators round up.
GRANULARITY = {"cuda": 512, "cpu": 1}


@dataclass(frozen=True)
class Setting:
    """What is planned; see `plan`."""

    source: Source
    optimizer: str
    sequence: int
    batch: int
    accumulation: int
    world: int
    strategy: str | None
    device: str
    update_in_backward: bool
    options: Mapping[str, Any]

    @property
    def keeps_gradients(self) -> bool:
        """Whether gradients are there before the last micro-batch's passes."""
        return self.accumulation > 1 or self.strategy == "ddp"

    def described(self) -> dict[str, Any]:
        """Everything but model and optimizer, by name."""
        return {
            "sequence": self.sequence,
            "batch": self.batch,
            "accumulation": self.accumulation,
            "world": self.world,
            "strategy": self.strategy,
            "device": self.device,
            "dtype": str(self.source.dtype).removeprefix("torch."),
            "checkpointing": self.source.checkpointing,
            "update_in_backward": self.update_in_backward,
            "options": dict(self.options),
        }


class Estimate:
    """What a run takes, for any micro-batch.

    Attributes:
        setting: what is planned.
        parameters: trained numbers.
        state: bytes of the optimizer's state on a process, by formula.
        wire: bytes that a process hands to collectives in a step; None for one process.
        notes: what the numbers leave out.

    Raises:
        ValueError: as `build`, or the model has no blocks.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self._granularity = GRANULARITY[setting.device]
        self._traces: dict[int, Trace] = {}
        self._mode = FakeTensorMode()
        dense = new_network(setting.source, torch.device("meta")).network
        with self._fake():
            self._model, optimizer = self._made("cpu")
            self._blocks = blocks_of(self._model, setting.source)
            trained = [param for param in self._model.parameters() if param.requires_grad]
            self._weights = held_bytes(self._model)
            self._gradients = sum(param.nbytes for param in trained)
            self._parts: Parts | None = None
            if setting.strategy == "fsdp2":
                self._parts = divided(self._model.network, self._blocks, setting.world)
            self._update, self._in_backward = self._updates(optimizer)
        self.parameters = sum(param.numel() for param in trained)
        world = 1 if self._parts is None else setting.world
        self.state = expected_state_bytes(setting.optimizer, dense, world, **setting.options)
        self.wire = self._sent(dense)
        self.notes = self._notes()

    @contextmanager
    def _fake(self) -> Iterator[None]:
        # There may be no GPU to wait for.
        waiting = mock.patch.object(torch.cuda, "synchronize", lambda device=None: None)
        with self._mode, assuming_libraries(), waiting, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield

    def _made(self, device: str) -> tuple[Network, LowRankOptimizer]:
        """The model as it is trained, of fake tensors, and its optimizer."""
        setting = self.setting
        model = new_network(setting.source, torch.device("meta"))
        place(model, torch.device(device))
        if setting.source.checkpointing:
            checkpoint_activations(model.network)
        with torch.random.fork_rng(devices=[]), Ledger():  # which answers what is read back
            optimizer = build(setting.optimizer, model.network, **setting.options)
        return model, optimizer

    def _updates(self, optimizer: LowRankOptimizer) -> tuple[Update, InBackward | None]:
        """What the optimizer takes in its step, and in the backward pass.

        Steps of layers need real backward passes, which fake tensors allow on a CPU only.
        """
        model, layers = self._model, isinstance(optimizer, FactoredAdamW)
        if not layers and self.setting.device != "cpu":
            model, optimizer = self._made(self.setting.device)

        def measured(params: list[nn.Parameter] | None) -> Update:
            def differentiate() -> None:
                if layers:
                    _backward(model)
                empty_gradients(model, params, replace=layers)

            with driverless(next(model.parameters()).device):
                return simulate(optimizer, model, differentiate, granularity=self._granularity)

        if not self.setting.update_in_backward:
            return measured(None), None
        blocks = blocks_of(model, self.setting.source).items
        first = list(blocks[0].parameters())
        inside = {id(param) for block in blocks for param in block.parameters()}
        scratch = measured(first).refresh
        rest = measured([param for param in model.parameters() if id(param) not in inside])
        freed = {id(param) for block in self._blocks.items for param in block.parameters()}
        return rest, InBackward(frozenset(freed), scratch)

    def phases(self, batch: int) -> dict[str, dict[str, int]]:
        """Bytes by category at the highest moment of each phase, for a micro-batch.

        Raises:
            ValueError: what the model computes depends on the numbers that it computes with.
        """
        found, update, parts = self._traced(batch), self._update, self._parts
        held = Counter(
            {
                "weights": self._weights if parts is None else parts.weights,
                "moments": self.state - update.state["basis"] - update.state["other"],
                "bases": update.state["basis"],
                "other state": update.state["other"],
            }
        )
        end = found.backward.end[GRADIENTS]
        levels = {
            "forward": found.forward.peak,
            "backward": found.backward.peak,
            "step": Counter({GRADIENTS: end, "scratch": update.step}),
            "refresh": Counter({GRADIENTS: end, "scratch": update.refresh}),
        }
        if parts is not None:
            share = parts.gradients / max(1, self._gradients)
            for level in levels.values():
                level[GRADIENTS] = round(level[GRADIENTS] * share)
            levels["forward"]["gathered"] = parts.gathered
            levels["backward"]["gathered"] = parts.gathered + parts.reduced
        return {
            name: {kind: (held + level)[kind] for kind in CATEGORIES}
            for name, level in levels.items()
        }

    def _traced(self, batch: int) -> Trace:
        if batch not in self._traces:
            with self._fake():
                self._traces[batch] = trace(
                    self._model,
                    self._blocks,
                    batch,
                    self.setting.sequence,
                    granularity=self._granularity,
                    again=self.setting.keeps_gradients,
                    in_backward=self._in_backward,
                )
        return self._traces[batch]

    def _sent(self, dense: nn.Module) -> Mapping[str, int | None] | None:
        setting = self.setting
        if setting.strategy is None:
            return None
        return wire_bytes(
            setting.optimizer,
            dense,
            setting.strategy,
            setting.world,
            setting.accumulation,
            self._parts,
            setting.options,
        )

    def _notes(self) -> tuple[str, ...]:
        notes = []
        if self.setting.device == "cuda":
            notes.append("attention as by fused kernels, which save no L x L scores")
        if self._parts is not None:
            notes.append("the optimizer's scratch is that of one process, an upper bound for parts")
        return tuple(notes)


def _backward(model: Network) -> None:
    """A backward pass that leaves each layer what its optimizer reads."""
    device = next(model.parameters()).device
    tokens = torch.zeros(1, 2, dtype=torch.int64, device=device)
    with torch.enable_grad():
        model(tokens, tokens).backward()


def blocks_of(model: Network, source: Source) -> Blocks:
    """The model's blocks.

    Raises:
        ValueError: it has none.
    """
    blocks = find_blocks(model)
    if blocks is None:
        raise ValueError(
            f"model={source.name!r}: {type(model.network).__name__} has no list of blocks"
        )
    return blocks
