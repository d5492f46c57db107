"""The settings of a training run: frozen dataclasses, checked where they are made.

The sections nest as they do in a YAML file or in ``--set section.key=value``. How files, presets
and flags are layered into one `RunConfig` is in `config_io`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from .data.config import DataConfig
from .model_config import DTYPES as DTYPES
from .model_config import ModelConfig as ModelConfig
from .model_config import require as _require

# Beyond any machine's cores; with very many the thread library ends the process without a word.
MOST_THREADS = 1024
# A month; beyond some centuries torch's own limits overflow.
LONGEST_TIMEOUT = 30 * 24 * 3600
# The record of allocations on a CPU grows with every step.
MOST_MEMORY_STEPS = 1000
SCHEDULES = ("cosine", "cosine_restarts", "linear", "wsd", "constant")
CLIP_NORMS = ("exact", "projected", "previous")
REFITS = ("whole", "first")
STRATEGIES = ("auto", "ddp", "fsdp2", "deepspeed")


@dataclass(frozen=True)
class OptimizerConfig:
    """Which optimizer trains, its learning rate, and whatever options its method takes.

    Attributes:
        name: one of `lowrank.optimizers.available()`.
        lr: peak learning rate; the schedule multiplies it.
        options: the method's own options (``rank``, ``update_proj_gap``, ``betas`` ...), passed on
            to `lowrank.optimizers.build`. In YAML they stand beside `name` and `lr`.
    """

    name: str = "galore_adamw"
    lr: float = 0.001
    options: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require(bool(self.name), "optimizer.name", self.name, "the name of an optimizer")
        _require(self.lr > 0, "optimizer.lr", self.lr, "a positive number")


@dataclass(frozen=True)
class TrainConfig:
    """Length and size of the run.

    Attributes:
        steps: optimizer steps.
        batch_size: sequences in one forward pass of one process.
        accumulation: forward passes per optimizer step (a step then takes
            batch_size x accumulation x processes sequences; see `DistributedConfig.data_shards`
            for runs whose number of processes changes).
        clip: global gradient norm above which gradients are scaled down; 0 switches it off.
        update_in_backward: update each parameter in the backward pass, as soon as its gradient is
            there, and free it; the weights are the same up to rounding. Whether a step is skipped
            is then decided by its loss alone: of gradients that are not finite the optimizer passes
            over the parameter, or with `clip` the step.
        clip_norm: the norm that `clip` bounds with `update_in_backward`: "exact" (of the gradients,
            which are all kept until it is known with `accumulation` above 1), "projected" (of what
            the optimizer uses of them) or "previous" (of the last step). Without `clip` the logged
            norm is of what the optimizer uses where `accumulation` is above 1.
        refit: what bases that are due are fitted to with `update_in_backward`: "whole" (the step's
            gradient, kept whole until then) or "first" (that of the step's first micro-batch, of
            which only projections are kept then).
        seed: seeds the weights, the data order and every other random number.
        device: "auto" (CUDA when there is one, else the CPU), "cpu", "cuda", "cuda:1" ...
        threads: CPU threads for torch; 0 leaves torch's own choice (all physical cores). Exact
            resume assumes that it stays the same.
        spike: nats by which a step's loss may exceed its running mean before the step is skipped;
            0 switches it off. Not-a-number losses and gradients are always skipped.
        max_skips: consecutive skipped steps after which the run stops.
    """

    steps: int = 200
    batch_size: int = 8
    accumulation: int = 1
    clip: float = 0.0
    update_in_backward: bool = False
    clip_norm: str = "exact"
    refit: str = "whole"
    seed: int = 42
    device: str = "auto"
    threads: int = 0
    spike: float = 3.0
    max_skips: int = 10

    def __post_init__(self) -> None:
        for key in ("steps", "batch_size", "accumulation", "max_skips"):
            value = getattr(self, key)
            _require(value >= 1, f"train.{key}", value, "a whole number of at least 1")
        _require(0 <= self.seed < 2**32, "train.seed", self.seed, "a whole number from 0 to 2^32-1")
        _require(
            0 <= self.threads <= MOST_THREADS,
            "train.threads",
            self.threads,
            f"0 or a number of threads up to {MOST_THREADS:,}",
        )
        _require(self.clip >= 0, "train.clip", self.clip, "0 (off) or a positive norm")
        accepted = CLIP_NORMS if self.update_in_backward and self.clip else CLIP_NORMS[:1]
        _require(
            self.clip_norm in accepted,
            "train.clip_norm",
            self.clip_norm,
            f"{', '.join(accepted)}, with train.clip={self.clip:g} and"
            f" train.update_in_backward={str(self.update_in_backward).lower()}",
        )
        whole_norm = self.clip and self.clip_norm == "exact" and self.accumulation > 1
        first = self.update_in_backward and not whole_norm
        _require(
            self.refit in (REFITS if first else REFITS[:1]),
            "train.refit",
            self.refit,
            f"whole, or with train.update_in_backward=true first, with train.clip={self.clip:g},"
            f" train.clip_norm={self.clip_norm} and train.accumulation={self.accumulation}",
        )
        _require(self.spike >= 0, "train.spike", self.spike, "0 (off) or a positive number of nats")
        _require(bool(self.device), "train.device", self.device, "auto, cpu, cuda or cuda:N")


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate's course over the run.

    Attributes:
        name: "cosine", "cosine_restarts" (ReLoRA's jagged cosine), "linear", "wsd" (warmup, stable,
            decay) or "constant".
        warmup_ratio: share of the steps spent rising linearly to the peak.
        min_ratio: learning rate at the end, as a share of the peak (unused by "constant").
        decay_ratio: share of the steps that "wsd" spends falling at the end.
        cycle: steps from one restart of "cosine_restarts" to the next; as many as between the
            method's merges or draws, which it is by itself where `optimizer.update_proj_gap` is
            given.
        restart_warmup: steps of the rise after each restart.
    """

    name: str = "cosine"
    warmup_ratio: float = 0.1
    min_ratio: float = 0.1
    decay_ratio: float = 0.2
    cycle: int = 0
    restart_warmup: int = 10

    def __post_init__(self) -> None:
        _require(self.name in SCHEDULES, "schedule.name", self.name, ", ".join(SCHEDULES))
        for key in ("warmup_ratio", "min_ratio", "decay_ratio"):
            value = getattr(self, key)
            _require(0 <= value <= 1, f"schedule.{key}", value, "a number from 0 to 1")
        if self.name == "cosine_restarts":
            _require(
                self.cycle >= 1,
                "schedule.cycle",
                self.cycle,
                "a number of steps, at least 1 (or optimizer.update_proj_gap, whose cycle it then"
                " follows)",
            )
            _require(
                0 <= self.restart_warmup < self.cycle,
                "schedule.restart_warmup",
                self.restart_warmup,
                f"at least 0 and fewer than schedule.cycle ({self.cycle})",
            )
        if self.name == "wsd":
            _require(
                self.warmup_ratio + self.decay_ratio <= 1,
                "schedule.decay_ratio",
                self.decay_ratio,
                f"at most 1 - warmup_ratio ({1 - self.warmup_ratio:g})",
            )


@dataclass(frozen=True)
class EvalConfig:
    """When and on how much text the model is evaluated; always first and last.

    Attributes:
        every: steps between evaluations; 0 for the first and the last only.
        tokens: validation tokens predicted each time.
        batch_size: sequences in one forward pass; 0 takes train.batch_size.
    """

    every: int = 50
    tokens: int = 32768
    batch_size: int = 0

    def __post_init__(self) -> None:
        _require(self.every >= 0, "eval.every", self.every, "0 or a number of steps")
        _require(self.tokens >= 1, "eval.tokens", self.tokens, "a whole number of at least 1")
        _require(
            self.batch_size >= 0, "eval.batch_size", self.batch_size, "0 or a number of sequences"
        )


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and how many stay (the last step always has one).

    Attributes:
        every: steps between checkpoints; 0 for the last (and the best) only.
        keep: newest checkpoints kept.
        best: also write and keep the one with the lowest validation loss.
    """

    every: int = 100
    keep: int = 2
    best: bool = True

    def __post_init__(self) -> None:
        _require(self.every >= 0, "checkpoint.every", self.every, "0 or a number of steps")
        _require(self.keep >= 1, "checkpoint.keep", self.keep, "a whole number of at least 1")


@dataclass(frozen=True)
class LogConfig:
    """What is shown and sent beside metrics.jsonl, which is always written.

    Attributes:
        progress: show the progress bar.
        wandb: also log to Weights & Biases (offline when WANDB_MODE says so).
        wandb_project: the project there.
        memory_steps: how many of the first steps are measured phase by phase, to hold the plan's
            memory against in the report; 0 for none. On a CPU these steps take several times as
            long.
        optimizer_time: record the optimizer's own time of each step, for which a CUDA device is
            waited for.
    """

    progress: bool = True
    wandb: bool = False
    wandb_project: str = "lowrank"
    memory_steps: int = 0
    optimizer_time: bool = False

    def __post_init__(self) -> None:
        _require(
            0 <= self.memory_steps <= MOST_MEMORY_STEPS,
            "log.memory_steps",
            self.memory_steps,
            f"0 (off) or a number of steps up to {MOST_MEMORY_STEPS}",
        )


@dataclass(frozen=True)
class DistributedConfig:
    """How several processes, started by torchrun, share a run.

    All but `data_shards` may change when a run is resumed, and so may the number of processes; from
    and to "deepspeed" nothing may.

    Attributes:
        strategy: "auto" (one process by itself, "ddp" under torchrun), "ddp" (each process holds
            all of the model and the optimizer's state), "fsdp2" (each holds a part of both) or
            "deepspeed" (ZeRO, which divides what `zero_stage` says). With one process there is
            nothing to share and all are the same.
        data_shards: parts into which the training data are dealt; a step takes
            train.batch_size x train.accumulation x data_shards sequences, however many processes
            share them. 0 is as many as there are processes when the run begins.
        zero_stage: the stage of DeepSpeed's ZeRO: 1 (the optimizer's state is divided), 2 (and the
            gradients) or 3 (and the weights).
        low_rank_gradients: under "ddp", exchange projected gradients where the optimizer's method
            allows it.
        timeout: seconds after which a process that doesn't answer counts as lost, and the others
            end.
    """

    strategy: str = "auto"
    data_shards: int = 0
    zero_stage: int = 1
    low_rank_gradients: bool = False
    timeout: float = 1800.0

    def __post_init__(self) -> None:
        _require(
            self.strategy in STRATEGIES,
            "distributed.strategy",
            self.strategy,
            ", ".join(STRATEGIES),
        )
        _require(
            self.data_shards >= 0,
            "distributed.data_shards",
            self.data_shards,
            "0 (as many as processes) or a whole number",
        )
        _require(
            self.zero_stage == 1 or (self.strategy == "deepspeed" and self.zero_stage in (2, 3)),
            "distributed.zero_stage",
            self.zero_stage,
            "1, 2 or 3 with distributed.strategy=deepspeed, else the default 1",
        )
        _require(
            not self.low_rank_gradients or self.strategy in ("auto", "ddp"),
            "distributed.low_rank_gradients",
            self.low_rank_gradients,
            f"false with distributed.strategy={self.strategy}, or true with ddp",
        )
        _require(
            0 < self.timeout <= LONGEST_TIMEOUT,
            "distributed.timeout",
            self.timeout,
            f"a number of seconds above 0, up to {LONGEST_TIMEOUT:,}",
        )


@dataclass(frozen=True)
class RunConfig:
    """Everything that defines a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)

    @property
    def eval_batch_size(self) -> int:
        """Sequences in one forward pass of an evaluation."""
        return self.eval.batch_size or self.train.batch_size


def warmup_steps(config: RunConfig) -> int:
    """The number of warmup steps: `schedule.warmup_ratio` of `train.steps`, rounded."""
    return math.floor(config.schedule.warmup_ratio * config.train.steps + 0.5)
