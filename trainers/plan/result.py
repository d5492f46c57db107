"""A plan: bytes by category and phase, and what follows from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

#: Categories in the order in which they are shown.
CATEGORIES = (
    "weights",
    "gathered",
    "gradients",
    "moments",
    "bases",
    "other state",
    "activations",
    "logits",
    "scratch",
)
PHASES = ("forward", "backward", "step", "refresh")

#: What a process takes on a GPU beside tensors, in bytes: CUDA's context, kernels, cuBLAS.
CONTEXT = (400 << 20, 900 << 20)
#: What torch's caching allocator holds beyond the tensors' peak, as a share of it.
FRAGMENTS = (0.01, 0.08)


@dataclass(frozen=True)
class Slack:
    """What comes to the tensors' bytes on a device: at least and at most, by experience."""

    low: int
    high: int

    @classmethod
    def of(cls, peak: int, device: str) -> Slack:
        """That of a process with this peak; on a CPU, where pages are the system's, none."""
        if device != "cuda":
            return cls(0, 0)
        low, high = (
            fixed + round(share * peak) for fixed, share in zip(CONTEXT, FRAGMENTS, strict=True)
        )
        return cls(low, high)


@dataclass(frozen=True)
class Plan:
    """What a process of a run takes, in bytes.

    Attributes:
        model: as it was given.
        optimizer: its name.
        setting: everything else that was asked for, by name.
        parameters: trained numbers, of all processes.
        phases: bytes by category, at the highest moment of each phase.
        state: bytes of the optimizer's state by formula.
        slack: what comes to it on the device.
        memory: what there is; None if it wasn't said.
        largest_batch: most sequences of a micro-batch that fit; None without `memory`.
        tokens_per_step: of all processes together.
        wire: bytes that a process hands to collectives in a step; None for one process.
        notes: what the numbers leave out.
        between_refits: bytes at the highest moment of steps without refits, where these keep less
            between micro-batches with updates in the backward pass; else None.
    """

    model: str
    optimizer: str
    setting: Mapping[str, Any]
    parameters: int
    phases: Mapping[str, Mapping[str, int]]
    state: int
    slack: Slack
    memory: int | None
    largest_batch: int | None
    tokens_per_step: int
    wire: Mapping[str, int | None] | None
    notes: tuple[str, ...] = ()
    between_refits: int | None = None

    @property
    def peaks(self) -> dict[str, int]:
        """Bytes of tensors at the highest moment of each phase."""
        return {name: sum(parts.values()) for name, parts in self.phases.items()}

    @property
    def peak(self) -> int:
        """Bytes of tensors at the highest moment of a step."""
        return max(self.peaks.values())

    @property
    def fits(self) -> str | None:
        """ "yes", "barely" (with the least slack only) or "no"; None without `memory`."""
        return None if self.memory is None else fits(self.peak, self.slack, self.memory)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            **self.setting,
            "parameters": self.parameters,
            "phases": {name: dict(parts) for name, parts in self.phases.items()},
            "peaks": self.peaks,
            "peak": self.peak,
            "peak_between_refits": self.between_refits,
            "optimizer_state_bytes": self.state,
            "slack": [self.slack.low, self.slack.high],
            "memory": self.memory,
            "fits": self.fits,
            "largest_batch": self.largest_batch,
            "tokens_per_step": self.tokens_per_step,
            "wire": None if self.wire is None else dict(self.wire),
            "notes": list(self.notes),
        }


def fits(peak: int, slack: Slack, memory: int) -> str:
    """ "yes", "barely" or "no"; see `Plan.fits`."""
    if peak + slack.high <= memory:
        return "yes"
    return "barely" if peak + slack.low <= memory else "no"
