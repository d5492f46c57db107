"""What all runs of a comparison have in common."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from lowrank.trainers.config import ModelConfig, ScheduleConfig
from lowrank.trainers.data.config import DataConfig


@dataclass(frozen=True)
class Setting:
    """One small LLaMA and how it is trained.

    Attributes:
        data: "stdlib" or a folder.
        steps: optimizer steps of a run.
        batch_size: sequences a step.
        sequence_length: tokens a sequence.
        hidden: width of the model; every projected matrix has this as its shorter side.
        rank: of all projected methods, but for those that are defined by another.
        gap: steps between refreshes of all projected methods.
        clip: largest gradient norm.
        validation_tokens: predicted at the end.
    """

    data: str = "stdlib"
    steps: int = 320
    batch_size: int = 8
    sequence_length: int = 64
    hidden: int = 128
    inner: int = 344
    layers: int = 4
    heads: int = 4
    vocabulary: int = 1024
    rank: int = 32
    gap: int = 40
    clip: float = 1.0
    validation_tokens: int = 32768
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

    @property
    def model(self) -> ModelConfig:
        """The model's shape."""
        return ModelConfig(
            name="comparison",
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            vocab_size=self.vocabulary,
        )

    @property
    def text(self) -> DataConfig:
        """The data and how it is cut."""
        return DataConfig(source=self.data, sequence_length=self.sequence_length)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)
