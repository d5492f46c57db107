"""A run's key figures: from its summary, or from its metrics while it has none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..table import initial_bits_per_byte, number
from ..units import perplexity
from .runs import MEMORY_CATEGORIES, Run

_STATE_CATEGORIES = ("moments", "basis", "other_state")


@dataclass(frozen=True)
class Headline:
    """Key figures of a run; None where unknown. Losses in nats per token, sizes in bytes.

    A final figure of a run that has not ended is its latest one.
    """

    model: str
    optimizer: str
    data: str
    parameters: float | None
    steps: float | None
    total_steps: float | None
    tokens: float | None
    epochs: float | None
    seconds: float | None
    skipped_steps: int
    skipped_updates: int
    skipped_documents: int
    initial_val_loss: float | None
    val_loss: float | None
    initial_perplexity: float | None
    val_perplexity: float | None
    initial_bits_per_byte: float | None
    bits_per_byte: float | None
    unigram_val_loss: float | None
    tokens_per_second: float | None
    optimizer_state_bytes: float | None
    adamw_state_bytes: float | None
    state_processes: int
    peak_memory_bytes: float | None


def headline(run: Run) -> Headline:
    """Collects the key figures of a run."""
    summary = run.summary or {}
    first_loss = _either(number(summary, "initial_val_loss"), _initial(run))
    loss = _either(number(summary, "val_loss"), run.val_loss.last)
    bits = _either(number(summary, "bits_per_byte"), run.bits_per_byte.last)
    return Headline(
        model=_name(summary.get("model"), run.config.get("model")),
        optimizer=_name(summary.get("optimizer"), run.config.get("optimizer")),
        data=_data_name(_name(summary.get("data"), {}), run.config.get("data")),
        parameters=number(summary, "parameters"),
        steps=_either(number(summary, "steps"), _last_step(run)),
        total_steps=_total_steps(run.config),
        tokens=_either(number(summary, "tokens"), run.tokens.last),
        epochs=_either(number(summary, "epochs"), run.epoch.last),
        seconds=number(summary, "wall_seconds"),
        skipped_steps=int(_either(number(summary, "skipped_steps"), float(len(run.skips))) or 0),
        skipped_updates=int(_either(number(summary, "skipped"), run.skipped_updates.last) or 0),
        skipped_documents=int(
            (number(summary, "skipped_documents") or 0)
            + (number(summary, "skipped_validation_documents") or 0)
        ),
        initial_val_loss=first_loss,
        val_loss=loss,
        initial_perplexity=None if first_loss is None else perplexity(first_loss),
        val_perplexity=_either(
            number(summary, "val_perplexity"), None if loss is None else perplexity(loss)
        ),
        initial_bits_per_byte=initial_bits_per_byte(first_loss, loss, bits),
        bits_per_byte=bits,
        unigram_val_loss=number(summary, "unigram_val_loss"),
        tokens_per_second=_either(number(summary, "tokens_per_second"), run.tokens_per_second.last),
        optimizer_state_bytes=_either(number(summary, "optimizer_state_bytes"), _state(run)),
        adamw_state_bytes=number(summary, "adamw_state_bytes"),
        state_processes=int(number(summary, "state_processes") or 1),
        peak_memory_bytes=_either(number(summary, "peak_memory_bytes"), run.memory["peak"].highest),
    )


def memory_categories(run: Run) -> dict[str, float]:
    """The largest size of each category of memory that the run measured, in bytes."""
    sizes = {key: run.memory[key].highest for key in MEMORY_CATEGORIES}
    return {key: size for key, size in sizes.items() if size is not None}


def _either(value: float | None, otherwise: float | None) -> float | None:
    return otherwise if value is None else value


def _initial(run: Run) -> float | None:
    """The validation loss before the first step: a later first evaluation is no initial one."""
    at_zero = len(run.val_loss) > 0 and run.val_loss.steps[0] == 0
    return run.val_loss.first if at_zero else None


def _last_step(run: Run) -> float | None:
    return float(run.loss.steps[-1]) if len(run.loss) else None


def _state(run: Run) -> float | None:
    sizes = [run.memory[key].last for key in _STATE_CATEGORIES]
    known = [size for size in sizes if size is not None]
    return sum(known) if known else None


def _total_steps(config: Mapping[str, object]) -> float | None:
    train = config.get("train")
    holder = train if isinstance(train, Mapping) else config
    return number(holder, "steps")


def _data_name(kind: str, section: object) -> str:
    """What a run's data is called: a folder by its own name, its path is of one machine alone."""
    given = _name(section, {})
    if kind in ("folder", "unknown") and given != "unknown":
        return Path(given).name or given
    return kind


def _name(*candidates: object) -> str:
    """The first candidate that is a name, or a section or record that holds one."""
    for candidate in candidates:
        if isinstance(candidate, str) and candidate:
            return candidate
        if isinstance(candidate, Mapping):
            for key in ("name", "source", "preset"):
                if isinstance(candidate.get(key), str) and candidate[key]:
                    return str(candidate[key])
    return "unknown"
