"""A small English-like corpus in C4's layout, and tiny runs of the real command on it."""

import gzip
import json
import random
from pathlib import Path

COMMON = (
    "the a of and to in that it is was he for on are with as his they at be this from have or by"
    " one had not but what all were when we there can an your which their said if do will each"
    " about how up out them then she many some so these would other into has more her two like"
)
WORDS = COMMON.split()

TINY = (
    "--device=cpu",
    "--set",
    "model.hidden_size=32",
    "model.intermediate_size=48",
    "model.num_hidden_layers=1",
    "model.num_attention_heads=2",
    "model.vocab_size=257",
    "data.tokenizer=bytes",
    "data.sequence_length=32",
    "train.batch_size=2",
    "train.accumulation=2",
    "eval.tokens=256",
    "eval.every=4",
    "checkpoint.every=3",
    "optimizer.rank=8",
    "optimizer.update_proj_gap=3",
    "log.progress=false",
)


def sentences(seed: int, count: int) -> str:
    """Deterministic text with word frequencies that fall off, as real text's do."""
    random_source = random.Random(seed)
    weights = [1 / (rank + 1) for rank in range(len(WORDS))]
    return " ".join(
        " ".join(random_source.choices(WORDS, weights, k=random_source.randint(4, 12))) + "."
        for _ in range(count)
    )


def write_corpus(folder: Path, documents: int = 60) -> Path:
    """Two training shards and a validation shard as C4 has them."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("c4-train.00000-of-00002", "c4-train.00001-of-00002", "c4-validation.00000-of-00001")
    for part, name in enumerate(names):
        with gzip.open(folder / f"{name}.json.gz", "wt", encoding="utf-8") as stream:
            for index in range(documents):
                stream.write(json.dumps({"text": sentences(1000 * part + index, 4)}) + "\n")
    return folder


def comparable_metrics(folder: Path) -> list[dict[str, object]]:
    """The records of metrics.jsonl without what may differ between equal runs."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in item.items() if k not in ("time", "memory")} for item in records]


def summary(folder: Path) -> dict[str, object]:
    content: dict[str, object] = json.loads((folder / "summary.json").read_text())
    return content
