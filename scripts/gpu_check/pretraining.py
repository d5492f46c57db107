"""A 7B model pretrained for a few steps on one card: measured peaks against aims and the plan."""

from __future__ import annotations

import functools
import importlib.util
import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lowrank import optimizers
from lowrank.optimizers.engine.method import TABLE

from .files import Json
from .record import NO_TIME, Record
from .section import Context
from .workload import Model

#: Tokens of a sequence; on a CPU the section's own.
SEQUENCE = 2048
#: Seconds that a trial takes at most on a card.
SECONDS = 45.0
#: How far a plan may be off.
TOLERANCE = 0.03
STEPS = 3


@dataclass(frozen=True)
class Pretraining:
    """A way to train in little memory.

    Attributes:
        label: for people.
        name: of the optimizer.
        aim: bytes of the peak at 7B.
        weight_bits: of the projected weights.
        options: of `build`.
    """

    label: str
    name: str
    aim: float
    weight_bits: int
    options: Json = field(default_factory=dict)


#: APOLLO-Mini's options; embeddings, head and norms have moments of 8 bits, as in Q-GaLore.
_MINI: Json = {"rank": 1, "plain_rule": "adamw_8bit"}
TRIALS = (
    Pretraining(
        "Q-GaLore, INT8 weights", "qgalore_adamw_8bit", 12.5e9, 8, {"refresh": "randomized"}
    ),
    Pretraining("APOLLO-Mini, INT8 weights", "apollo_mini_adamw", 8.6e9, 8, _MINI),
    Pretraining("APOLLO-Mini, INT4 weights", "apollo_mini_adamw", 5.5e9, 4, _MINI),
)


def run(record: Record, context: Context) -> None:
    """Each trial where this version and the machine can."""
    model = context.size.models["7b"]
    for trial in TRIALS:
        label = f"{model.name} pretraining: {trial.label}"
        record.attempt(label, functools.partial(_trial, record, context, model, trial, label))


def missing(trial: Pretraining) -> str | None:
    """What this version or installation lacks for a trial, or None."""
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed"
    conversion = TABLE[trial.name].conversion
    if conversion is None or "weight_bits" not in conversion.options:
        return f"{trial.name} has no weights of {trial.weight_bits} bits in this version"
    if not hasattr(optimizers, "update_in_backward"):
        return "lowrank.optimizers has no update_in_backward in this version"
    return None


def _trial(record: Record, context: Context, model: Model, trial: Pretraining, label: str) -> None:
    lacking = missing(trial)
    if lacking is not None:
        record.skip(label, lacking)
        return
    if context.on_gpu and context.clock.left() < SECONDS:
        record.skip(label, NO_TIME)
        return
    from lowrank.trainers.plan import measure, plan

    device = "cuda" if context.on_gpu else "cpu"
    sequence = SEQUENCE if context.on_gpu else context.size.sequence
    # A later refresh of all bases is among the steps.
    options = {"lr": 1e-4, "rank": model.rank, "update_proj_gap": STEPS - 1}
    options |= {"weight_bits": trial.weight_bits} | trial.options
    with tempfile.TemporaryDirectory() as folder:
        file = write_config(model, sequence, Path(folder))
        setting: Json = {
            "sequence": sequence,
            "device": device,
            "checkpointing": True,
            "update_in_backward": True,
            "options": options,
        }
        planned = plan(str(file), trial.name, **setting)
        if context.on_gpu:
            free, _ = torch.cuda.mem_get_info()
            if planned.peak > free:
                record.skip(
                    label, f"needs {planned.peak / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"
                )
                return
        found = measure(str(file), trial.name, steps=STEPS, **setting)
    record.check(
        f"{label}: state bytes",
        found.state == planned.state,
        f"{found.state} measured, {planned.state} planned",
    )
    off = planned.peak / found.peak - 1
    record.check(
        f"{label}: the plan is within {TOLERANCE:.0%}",
        abs(off) <= TOLERANCE or not context.on_gpu,
        f"{found.peak / 1e9:.3g} GB measured, {planned.peak / 1e9:.3g} GB planned",
    )
    most = max(found.peaks, key=lambda name: found.peaks[name])
    record.add(
        model.name,
        f"pretraining, {trial.label}: peak",
        found.peak / 1e9,
        "GB",
        aim=context.aim(trial.aim / 1e9),
        note=f"in {most}; planned {planned.peak / 1e9:.3g} GB ({off:+.1%})",
        details={
            "peaks": dict(found.peaks),
            "planned": planned.peaks,
            "weight_bytes": found.weights,
            "state_bytes": found.state,
            "tokens": sequence,
        },
    )


def write_config(model: Model, sequence: int, folder: Path) -> Path:
    """The `config.json` of a model's LLaMA."""
    file = folder / "config.json"
    shape = {
        "model_type": "llama",
        "vocab_size": model.vocabulary,
        "hidden_size": model.hidden,
        "intermediate_size": model.inner,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "max_position_embeddings": sequence,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    file.write_text(json.dumps(shape), encoding="utf-8")
    return file
