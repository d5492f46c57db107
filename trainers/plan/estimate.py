"""The numbers of a plan: the run's own code on fake tensors, each part once."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lowrank.optimizers import FactoredAdamW, expected_state_bytes
from lowrank.optimizers.engine.devices import as_on_gpu, assuming_memory
from lowrank.optimizers.registry import without_effect

from ..loss import chunk_tokens
from .deeper import Depths, Step
from .driverless import driverless
from .early import (
    InBackward,
    Kinds,
    Sum,
    Used,
    bytes_of,
    kind_of,
    kinds,
    leaves_more,
    left_to_step,
    summed,
    trained,
)
from .fakes import DEPTHS, Fake, blocks_of, faking, grown, made
from .network import Blocks, Network, Source, new_network
from .result import CATEGORIES
from .sharded import Parts, check_divisible, divided, wire_bytes
from .trace import GRADIENTS, Trace, trace
from .update import Update, empty_gradients, simulate

#: What is kept between micro-batches with updates in the backward pass.
WHOLE = "this method's gradients are kept whole between the micro-batches of a step"
WHOLE_FOR_REFITS = (
    "gradients are kept whole between the micro-batches of a step with refits, as the first one is"
    " (refit='first' keeps projections)"
)

#: Bytes to a multiple of which torch's allocators round up.
GRANULARITY = {"cuda": 512, "cpu": 1}


@dataclass(frozen=True)
class Setting:
    """What is planned; see `plan`. `memory` is that of a GPU, None for the one that is there."""

    source: Source
    optimizer: str
    sequence: int
    batch: int
    accumulation: int
    world: int
    strategy: str | None
    device: str
    update_in_backward: bool
    refit: str
    options: Mapping[str, Any]
    memory: int | None = None

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
            "autocast": self.source.autocast,
            "checkpointing": self.source.checkpointing,
            "update_in_backward": self.update_in_backward,
            "refit": self.refit,
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
        self._traces: dict[tuple[int, int], Trace] = {}
        self._mode = FakeTensorMode()
        #: A model of few blocks on the CPU whose optimizer has taken no steps.
        self._unused: Fake | None = None
        #: Bytes of gradients that are kept for a step with a refresh only.
        self._due_only = 0
        whole = new_network(setting.source, torch.device("meta"))
        blocks = blocks_of(whole, setting.source)
        check_rank(setting, blocks)
        self._whole = whole
        self._depth = len(blocks.items)
        self._vocabulary = len(whole.network.get_output_embeddings().weight)
        few, many = DEPTHS
        #: Numbers of blocks that stand for all; None where all of them run.
        self._depths = Depths(few, many, self._depth) if self._depth > many else None
        if not blocks.equal:
            self._depths = None
        with faking(self._mode), assuming_memory(setting.memory):
            self._fake = self._made(self._depth if self._depths is None else many)
            self._sizes = self._fake.sizes()
            if self._depths is not None:
                self._unused = self._made(few)
                self._sizes = grown(self._unused.sizes(), self._sizes, self._depths)
            # Another one takes steps: what is due in the first one shows in its passes, too.
            self._update, self._kinds = self._updates()
        self._parts: Parts | None = None
        if setting.strategy == "fsdp2":
            check_divisible(setting.optimizer, setting.options)
            self._parts = divided(whole.network, blocks, setting.world)
        self.parameters = self._sizes["parameters"]
        world = 1 if self._parts is None else setting.world
        self.state = expected_state_bytes(
            setting.optimizer, whole.network, world, **setting.options
        )
        self.wire = self._sent(whole.network)
        self.notes = self._notes()

    def _made(self, depth: int, device: str = "cpu") -> Fake:
        setting = self.setting
        return made(self._whole, setting.source, setting.optimizer, setting.options, device, depth)

    def _updates(self) -> tuple[Update, Kinds]:
        """What the optimizer takes in its step, and in the backward passes.

        Steps of some layers need real backward passes, which fake tensors allow on a CPU only.
        """
        where = "cpu" if isinstance(self._fake.optimizer, FactoredAdamW) else self.setting.device
        if self.setting.update_in_backward:
            return self._in_passes(self._made(len(self._fake.blocks.items), where), where)
        return self._of_all_blocks(lambda fake: self._simulated(fake), where), Kinds(None)

    def _of_all_blocks(
        self, steps: Callable[[Fake], list[Step]], where: str, ready: Fake | None = None
    ) -> Update:
        """What steps take with the whole model; `ready` is one that may be used for them."""
        if self._depths is not None:
            few, many = self._depths.few, self._depths.many
            second = steps(self._made(many, where) if ready is None else ready)
            unused = self._unused if where == "cpu" else None
            self._unused = None
            first = steps(self._made(few, where) if unused is None else unused)
            found = Update.deeper(first, second, self._depths)
            if found is not None:
                return found
        return Update.of(steps(self._made(self._depth, where)))

    def _in_passes(self, fake: Fake, where: str) -> tuple[Update, Kinds]:
        """What the updates of single parameters add in the backward pass, and what is left."""
        layers = isinstance(fake.optimizer, FactoredAdamW)
        left = left_to_step(self._fake)
        # What is due in the first step alone, as LoQT's bases are, is not left in others.
        usual = left_to_step(self._fake, due=False) if layers else left
        used: dict[object, Used] = {}
        for name, param in trained(fake):
            kind = kind_of(fake, param)
            if name not in left and kind not in used:
                steps = self._simulated(fake, [param], beside=True, renewing=not layers)
                one = Update.of(steps)
                # Events of layers wait for step().
                due = one.step if layers else one.refresh
                used[kind] = Used(due, one.step or due, self._summed(fake, param))
        rest = self._rest(fake, left, where, usual=left == usual)
        if left != usual:
            self._due_only = bytes_of(self._fake, left - usual, self._depth)
            between = self._rest(fake, usual, where, renewing=False)
            rest = replace(rest, step=between.step)
        return rest, kinds(self._fake, left, used, self.setting.accumulation, self.setting.refit)

    def _summed(self, fake: Fake, param: nn.Parameter) -> Sum | None:
        """What is kept of a parameter between micro-batches of a step without a refit."""
        if self.setting.accumulation == 1:
            return None

        def simulated(micro_batches: Callable[[], None]) -> list[Step]:
            return self._steps(fake, micro_batches, beside=True, renewing=False)

        return summed(fake, param, self._granularity, simulated)

    def _rest(
        self,
        fake: Fake,
        names: Set[str],
        where: str,
        *,
        usual: bool = True,
        renewing: bool = True,
    ) -> Update:
        """Steps with the gradients that are left to them: in `fake` those of these names."""
        if not names:
            return Update(0, 0)

        def steps(of: Fake) -> list[Step]:
            left = names if of is fake else left_to_step(of, due=renewing)
            kept = [param for name, param in trained(of) if name in left]
            only = {"usual": usual, "renewing": renewing}
            return self._simulated(of, kept, beside=not renewing, **only)

        return self._of_all_blocks(steps, where, fake)

    def _simulated(
        self,
        fake: Fake,
        params: list[nn.Parameter] | None = None,
        *,
        beside: bool = False,
        usual: bool = True,
        renewing: bool = True,
    ) -> list[Step]:
        """Steps with gradients of some parameters, or of all; see `simulate`."""
        layers = leaves_more(fake)
        if layers and params is not None:
            # What layers hand over is for events, which a single parameter's update has none of.
            layers = renewing and any("events" in own for own in fake.optimizer.state.values())

        def differentiate() -> None:
            if layers:
                _backward(fake.model)
            empty_gradients(fake.model, params, replace=layers)

        return self._steps(fake, differentiate, beside=beside, usual=usual, renewing=renewing)

    def _steps(self, fake: Fake, differentiate: Callable[[], None], **wanted: bool) -> list[Step]:
        """Steps after gradients that a function leaves; see `simulate`."""
        # Layers take the steps of a GPU, if it is planned, on fakes of another device.
        as_wanted = as_on_gpu() if self.setting.device == "cuda" else contextlib.nullcontext()
        with driverless(next(fake.model.parameters()).device), as_wanted:
            return simulate(
                fake.optimizer,
                fake.model,
                differentiate,
                granularity=self._granularity,
                **wanted,
            )

    def phases(self, batch: int) -> dict[str, dict[str, int]]:
        """Bytes by category at the highest moment of each phase, for a micro-batch.

        Raises:
            ValueError: what the model computes depends on the numbers that it computes with.
        """
        return self._phases(self._kinds.all(), batch)

    def between_refits(self, batch: int) -> int | None:
        """The peak of steps without refits, where they keep less between micro-batches."""
        usual = self._kinds.usual
        if usual is None:
            return None
        phases = self._phases([usual], batch)
        return max(sum(parts.values()) for name, parts in phases.items() if name != "refresh")

    def _phases(self, kinds: Sequence[InBackward | None], batch: int) -> dict[str, dict[str, int]]:
        """Those of steps of these kinds."""
        traces = [self._traced(batch, kind) for kind in kinds]
        found, update, parts = traces[0], self._update, self._parts
        sizes = self._sizes
        held = Counter(
            {
                "weights": sizes["weights"] if parts is None else parts.weights,
                "moments": self.state - sizes["basis"] - sizes["other"],
                "bases": sizes["basis"],
                "other state": sizes["other"],
            }
        )
        end = found.backward.end[GRADIENTS]
        levels = {
            "forward": max((own.forward.peak for own in traces), key=Counter.total),
            "backward": max((own.backward.peak for own in traces), key=Counter.total),
            "step": Counter({GRADIENTS: end - self._due_only, "scratch": update.step}),
            "refresh": Counter({GRADIENTS: end, "scratch": update.refresh}),
        }
        if update.left:
            levels["refresh"] = levels["refresh"] + Counter(
                {name: size for name, size in found.backward.end.items() if name != GRADIENTS}
            )
        if parts is not None:
            share = parts.gradients / max(1, sizes["gradients"])
            for level in levels.values():
                level[GRADIENTS] = round(level[GRADIENTS] * share)
            levels["forward"]["gathered"] = parts.gathered
            levels["backward"]["gathered"] = parts.gathered + parts.reduced
        return {
            name: {kind: (held + level)[kind] for kind in CATEGORIES}
            for name, level in levels.items()
        }

    def _traced(self, batch: int, kind: InBackward | None) -> Trace:
        """The passes of micro-batches; large ones by those of two smaller ones."""
        setting = self.setting
        first = 1 + -(-chunk_tokens(self._vocabulary) // setting.sequence)
        second = 2 * first
        if batch > second:
            larger = self._traced(second, kind)
            return larger.onward(self._traced(first, kind), (batch - second) / (second - first))
        known = self._traces.get((batch, id(kind)))
        if known is not None:
            return known
        keeps = setting.keeps_gradients and kind is None
        with faking(self._mode):
            found = trace(
                self._fake.model,
                self._fake.blocks,
                batch,
                setting.sequence,
                depth=self._depth,
                kept=self._sizes["gradients"] if keeps else 0,
                earlier=setting.accumulation > 1,
                granularity=self._granularity,
                in_backward=kind,
            )
        self._traces[batch, id(kind)] = found
        return found

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

    def _kept_whole(self) -> list[str]:
        """Whose gradients are kept whole between micro-batches, if any are that need not be."""
        due = self._kinds.due
        if due is not None and due.sums:
            return []
        return [WHOLE if self._kinds.usual is None else WHOLE_FOR_REFITS]

    def _notes(self) -> tuple[str, ...]:
        setting = self.setting
        notes = [
            f"{option}={setting.options[option]!r} has no effect on {setting.optimizer}"
            for option in without_effect(setting.optimizer, setting.options)
        ]
        if self.setting.device == "cuda":
            notes.append("attention as by fused kernels, which save no L x L scores")
        if self._parts is not None:
            notes.append("the optimizer's scratch is that of one process, an upper bound for parts")
        if setting.update_in_backward and setting.accumulation > 1:
            notes += self._kept_whole()
        return tuple(notes)


def check_rank(setting: Setting, blocks: Blocks) -> None:
    """Raises `ValueError` for a rank that `build` would reduce for each matrix."""
    rank = setting.options.get("rank")
    shapes = [param.shape for param in blocks.items[0].parameters() if param.dim() == 2]
    largest = max((min(shape) for shape in shapes), default=0)
    if isinstance(rank, int) and rank > largest > 0:
        raise ValueError(
            f"rank={rank}: accepted for the blocks of {setting.source.name!r} are at most {largest}"
        )


def _backward(model: Network) -> None:
    """A backward pass that leaves each layer what its optimizer reads."""
    device = next(model.parameters()).device
    tokens = torch.zeros(1, 2, dtype=torch.int64, device=device)
    with torch.enable_grad():
        model(tokens, tokens).backward()
