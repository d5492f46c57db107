"""Learning rates tuned on one grid: from the middle outwards, until the best one is surrounded."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

from .entrants import Entrant
from .pool import Ledger, run_all
from .run import Job

#: The grid of both learning rates, for every method.
GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
START = 3e-3
#: Seed of the tuning runs; the table's are others.
TUNING_SEED = 100

Rates = dict[str, float]


def neighbours(best: float) -> list[float]:
    """The next lower and higher rate of the grid."""
    place = GRID.index(best)
    return [GRID[i] for i in (place - 1, place + 1) if 0 <= i < len(GRID)]


def wanted(known: Mapping[tuple[float, float], float], plain_lr: float | None) -> set[Any]:
    """Pairs (lr, plain_lr) to try next; none when the best pair's neighbours are all known.

    Args:
        known: loss by pair.
        plain_lr: the one to keep to, or None to tune it too.
    """
    if not known:
        return {(START, START if plain_lr is None else plain_lr)}
    lr, plain = min(known, key=lambda pair: known[pair])
    pairs = {(other, plain) for other in neighbours(lr)}
    if plain_lr is None:
        pairs |= {(lr, other) for other in neighbours(plain)}
    return pairs - known.keys()


def tune(
    ledger: Ledger, entrants: Sequence[Entrant], executor: Executor, progress: Callable[[str], None]
) -> dict[str, Rates]:
    """Tunes everyone's `lr`, and `plain_lr` of those whose rate for the plain ones is shared.

    An official package is tuned like any method: at rates that suit ours it could only lose.

    Returns:
        {"lr", "plain_lr", "val_loss"} by entrant.
    """
    heads = [e for e in entrants if e.plain == e.name]
    tuned = _search(ledger, {e.name: None for e in heads}, executor, progress)
    others = {e.name: tuned[e.plain]["plain_lr"] for e in entrants}
    rest = {name: plain for name, plain in others.items() if name not in tuned}
    return tuned | _search(ledger, rest, executor, progress)


def _search(
    ledger: Ledger,
    names: Mapping[str, float | None],
    executor: Executor,
    progress: Callable[[str], None],
) -> dict[str, Rates]:
    known: dict[str, dict[tuple[float, float], float]] = {name: {} for name in names}
    while True:
        jobs = [
            Job(name, lr, plain, TUNING_SEED)
            for name, fixed in names.items()
            for lr, plain in sorted(wanted(known[name], fixed))
        ]
        if not jobs:
            break
        results = run_all(ledger, jobs, executor, progress)
        for job in jobs:
            known[job.name][job.lr, job.plain_lr] = results[job]["val_loss"]
    best = {name: min(pairs, key=lambda pair: pairs[pair]) for name, pairs in known.items()}
    return {
        name: {"lr": lr, "plain_lr": plain, "val_loss": known[name][lr, plain]}
        for name, (lr, plain) in best.items()
    }


def read_rates(path: Path) -> dict[str, Rates]:
    """Tuned rates by method.

    Raises:
        ValueError: there is no such file, or it isn't one.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
        return dict(content["rates"])
    except FileNotFoundError:
        raise ValueError(f"{path} doesn't exist; --tune makes it") from None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no learning rates: {error}; --tune makes it anew") from None


def write_rates(path: Path, rates: Mapping[str, Rates], ledger: Ledger) -> None:
    """Writes tuned rates, adding to those of other methods that the file has."""
    former = read_rates(path) if path.exists() else {}
    content = {
        "grid": list(GRID),
        "seed": TUNING_SEED,
        "setting": ledger.setting.as_dict(),
        "rates": dict(sorted((former | dict(rates)).items())),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".json.new")
    aside.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    aside.replace(path)
