"""A table of what steps ask of a GPU, counted without one; `./scripts/gpu-steps` runs it.

For each method, model and rank the largest number over the model's shapes of matrices.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch

from lowrank.trainers.plan.cards import card_bytes
from lowrank.trainers.plan.launches import count_step

from .overhead import host_seconds

#: Hidden size, inner size and blocks of the LLaMA presets.
MODELS = {"60m": (512, 1376, 8), "1b": (2048, 5461, 24), "7b": (4096, 11008, 32)}
METHODS = (
    *("galore_adamw", "galore_adamw_8bit", "qgalore_adamw_8bit", "fira_adamw", "apollo_adamw"),
    *("frugal_adamw", "online_subspace_adamw", "online_subspace_lion", "coap_adamw"),
    *("galore_muon", "galore_adafactor", "muon"),
)
RANKS = (128, 512, 1024)
_HEAD = (
    "| method | model | rank | reads | operations | filled | products a matrix "
    "| passes a matrix | pieces |\n"
    "|---|---|---|---|---|---|---|---|---|\n"
)


def shapes(model: str) -> dict[tuple[int, int], int]:
    """The shapes of a LLaMA's matrices, and how many there are of each."""
    hidden, inner, blocks = MODELS[model]
    return {(hidden, hidden): 4 * blocks, (inner, hidden): 2 * blocks, (hidden, inner): blocks}


def row(method: str, model: str, rank: int, **options: Any) -> str:
    """A row of the table."""
    found = [
        (count_step(method, shape, number, rank=rank, **options), number)
        for shape, number in shapes(model).items()
    ]

    def most(name: str) -> int:
        return max(getattr(one, name) for one, _ in found)

    each = [max(getattr(one, name) / number for one, number in found) for name in _DENSE]
    dense = [f"{value:.3g}" for value in each]
    numbers = [most("reads"), most("operations"), most("filled"), *dense, most("pieces")]
    return f"| `{method}` | {model} | {rank} | " + " | ".join(map(str, numbers)) + " |\n"


_DENSE = ("products", "passes")


def main() -> None:
    """Writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--ranks", default=",".join(map(str, RANKS)))
    parser.add_argument("--card", default="H100", help="whose memory bounds scratch")
    parser.add_argument("--capturable", action="store_true", help="as CUDA graphs capture them")
    parser.add_argument("--host", action="store_true", help="the host's time for 60M instead")
    given = parser.parse_args()
    if given.host:
        torch.set_num_threads(1)
        for method in given.methods.split(","):
            sys.stdout.write(f"{method}: {1e3 * host_seconds(method):.2f} ms\n")
        return
    options = {"capturable": True} if given.capturable else {}
    options["memory"] = card_bytes(given.card)
    sys.stdout.write(_HEAD)
    for method in given.methods.split(","):
        for model in given.models.split(","):
            for rank in map(int, given.ranks.split(",")):
                if rank < MODELS[model][0]:
                    sys.stdout.write(row(method, model, rank, **options))
                    sys.stdout.flush()


if __name__ == "__main__":
    main()
