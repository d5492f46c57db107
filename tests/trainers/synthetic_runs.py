"""Makes run folders that look like real ones, in a few milliseconds."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

MIB = 2**20


@dataclass(frozen=True)
class RunPlan:
    """What a synthetic run is to look like."""

    optimizer: str = "galore_adamw"
    steps: int = 300
    total_steps: int | None = None
    final_loss: float = 4.6
    gap: int = 40
    refreshes: bool = True
    finished: bool = True
    skips: tuple[int, ...] = ()
    events: tuple[tuple[int, str, str], ...] = ()
    eval_every: int = 50
    moments: int = 24 * MIB
    basis: int = 7 * MIB
    seed: int = 0
    config: Mapping[str, object] = field(default_factory=dict)
    summary: Mapping[str, object] = field(default_factory=dict)


def write_run(folder: Path, plan: RunPlan = RunPlan()) -> Path:
    """Writes config.yaml, metrics.jsonl and, for a finished run, summary.json; returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    total = plan.total_steps or plan.steps
    config: dict[str, object] = {
        "seed": plan.seed,
        "device": "cpu",
        "output": str(folder.name),
        "model": {"name": "llama_9m", "hidden_size": 320, "layers": 5, "heads": 5, "ffn": 864},
        "data": {"source": "stdlib", "tokenizer": "bpe", "sequence_length": 256, "packing": "pack"},
        "optimizer": {"name": plan.optimizer, "lr": 0.01, "rank": 128, "update_proj_gap": plan.gap},
        "train": {"steps": total, "batch_size": 16, "accumulation": 1, "clip": 1.0},
        "schedule": {"name": "cosine", "warmup": total // 10, "min_ratio": 0.1},
        "eval": {"every": plan.eval_every, "tokens": 65536},
        "checkpoint": {"every": 100, "keep": 2},
        **plan.config,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    records = _records(plan, total)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(lines, encoding="utf-8")
    if plan.finished:
        summary = {**_summary(plan, records), **plan.summary}
        (folder / "summary.json").write_text(json.dumps(summary, indent=2), encoding="utf-8")
    return folder


def curve(plan: RunPlan, step: int) -> float:
    """The loss without noise: from 8.32 down, as a small model on little text learns."""
    return plan.final_loss + (8.32 - plan.final_loss) * (1 + step / 8) ** -0.62


def _records(plan: RunPlan, total: int) -> list[dict[str, object]]:
    chance = random.Random(plan.seed)
    records = [_evaluation(plan, 0)]
    warmup = max(total // 10, 1)
    for step in range(1, plan.steps + 1):
        if step in plan.skips:
            records.append({"kind": "skip", "step": step, "reason": "nan_loss", "value": None})
            continue
        refreshes = plan.refreshes and (step - 1) % plan.gap == 0
        ramp = min(step / warmup, 1.0)
        decay = 0.1 + 0.45 * (
            1 + math.cos(math.pi * max(step - warmup, 0) / max(total - warmup, 1))
        )
        seconds = 0.52 + chance.gauss(0, 0.02) + (0.9 if refreshes else 0.0)
        if refreshes:
            records.append(_refresh(step, chance, first=step == 1))
        for at, name, detail in plan.events:
            if at == step:
                records.append({"kind": "event", "step": step, "name": name, "detail": detail})
        records.append(
            {
                "kind": "train",
                "step": step,
                "loss": curve(plan, step) + chance.gauss(0, 0.09),
                "lr": 0.01 * (ramp if step < warmup else decay),
                "grad_norm": 0.35 + 2.2 * math.exp(-step / 12) + abs(chance.gauss(0, 0.06)),
                "tokens": step * 4096,
                "epoch": step * 4096 / 900_000,
                "time": {"seconds": seconds, "tokens_per_second": 4096 / seconds},
                "memory": {
                    "weights": 34 * MIB,
                    "gradients": 34 * MIB,
                    "moments": plan.moments,
                    "basis": plan.basis,
                    "other_state": 2048,
                    "process": int((880 + 40 * (1 - math.exp(-step / 5))) * MIB),
                    "peak": int((930 + (25 if step > 50 else 0)) * MIB),
                },
            }
        )
        if step % plan.eval_every == 0 or step == plan.steps:
            records.append(_evaluation(plan, step))
    return records


def _evaluation(plan: RunPlan, step: int) -> dict[str, object]:
    loss = curve(plan, step) + (0.08 if step else 0.0)
    return {
        "kind": "eval",
        "step": step,
        "val_loss": loss,
        "val_perplexity": math.exp(loss),
        "bits_per_byte": loss / math.log(2) / 3.4,
        "tokens": 65536,
        "time": {"seconds": 4.1},
    }


def _refresh(step: int, chance: random.Random, *, first: bool) -> dict[str, object]:
    energy = 0.93 - 0.25 * math.exp(-step / 60) + chance.gauss(0, 0.01)
    return {
        "kind": "refresh",
        "step": step,
        "matrices": 35,
        "captured_energy": energy,
        "captured_energy_min": energy - 0.2 + chance.gauss(0, 0.02),
        "overlap": None if first else 0.62 + 0.15 * math.exp(-step / 90) + chance.gauss(0, 0.01),
        "time": {"seconds": 0.9 + chance.gauss(0, 0.05)},
    }


def _summary(plan: RunPlan, records: list[dict[str, object]]) -> dict[str, object]:
    last = next(record for record in reversed(records) if record["kind"] == "eval")
    return {
        "optimizer": plan.optimizer,
        "model": "llama_9m",
        "parameters": 8_815_680,
        "steps": plan.steps,
        "tokens": plan.steps * 4096,
        "epochs": plan.steps * 4096 / 900_000,
        "initial_val_loss": 8.32,
        "val_loss": last["val_loss"],
        "unigram_val_loss": 6.512,
        "val_perplexity": last["val_perplexity"],
        "bits_per_byte": last["bits_per_byte"],
        "tokens_per_second": 7421.5,
        "weight_bytes": 34 * MIB,
        "optimizer_state_bytes": plan.moments + plan.basis + 2048,
        "adamw_state_bytes": 68 * MIB,
        "peak_memory_bytes": 955 * MIB,
        "skipped_steps": len(plan.skips),
        "skipped_documents": 0,
        "wall_seconds": 0.55 * plan.steps,
        "device": "cpu",
        "torch_version": "2.13.0",
        "lowrank_version": "0.1.0",
        "python_version": "3.11.7",
        "data": {"source": "stdlib", "files": 1204, "sha256": "3f" * 32},
        "weights_sha256": "ab" * 32,
    }
