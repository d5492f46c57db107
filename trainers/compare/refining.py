"""Settings found before, read from a file, and a search of `lr` around them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lowrank.optimizers import available, option_aliases
from lowrank.optimizers.engine.options import OF_SOME_METHOD, OWN_RATES
from lowrank.optimizers.engine.plain_rules import PLAIN_RULES

from ..config_io import nearest
from ..preset import canonical
from .entries import Entry
from .plan import FOUND, Run
from .pool import Say
from .search import RunAll, search
from .tuning import given_by, trial

#: Factors of lr that are tried, and how many at most: further ones follow while the best lies at an
#: end.
FACTORS, MOST = (0.5, 1.0, 2.0), 5


def read_rates(path: Path) -> dict[str, dict[str, Any]]:
    """Settings found before: a comparison's folder, its results.json, or a file of rates.

    Returns:
        Optimizer settings by label, of each at least `lr`.

    Raises:
        ValueError: there is no such file, it holds none, or one is wrong.
    """
    file = path / "results.json" if path.is_dir() else path
    try:
        rates = json.loads(file.read_text("utf-8"))["rates"]
        found = {
            str(label): {str(k): v for k, v in options.items() if k not in FOUND}
            for label, options in rates.items()
        }
    except FileNotFoundError:
        raise ValueError(f"--rates {path}: {file} doesn't exist") from None
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ValueError(
            f"--rates {path}: {file} holds no rates ({error!r}); --tune finds some"
        ) from None
    if not found:
        raise ValueError(f"--rates {path}: {file} holds no rates; --tune finds some")
    for label, options in found.items():
        try:
            _check(options)
        except ValueError as error:
            raise ValueError(f"--rates {path}: {file}: rates of {label}: {error}") from None
    return found


def rates_model(path: Path) -> str | None:
    """The model that settings were found on, if what `read_rates` reads says so."""
    file = path / "results.json" if path.is_dir() else path
    model = json.loads(file.read_text("utf-8")).get("model")
    return model if isinstance(model, str) else None


def _check(options: Mapping[str, Any]) -> None:
    """Raises `ValueError` for the first name or value that no method takes."""
    if "lr" not in options:
        raise ValueError("there is no lr; accepted: lr, and further options of the optimizer")
    aliases = (option_aliases(name) for name in available())
    known = {"lr", *OF_SOME_METHOD}.union(*aliases)
    for key, value in options.items():
        if key not in known:
            raise ValueError(f"unknown option {key!r}; {nearest(key, known)}")
        if key == "lr" or (key in OWN_RATES and value is not None):
            if not _is_number(value):
                raise ValueError(f"{key} is {value!r}; accepted: a number of at least 0")
        elif key == "betas" and value is not None:
            if not (isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))):
                raise ValueError(f"betas is {value!r}; accepted: two numbers, or null")
        elif key == "plain_rule" and value not in (None, *PLAIN_RULES):
            accepted = f"{', '.join(PLAIN_RULES)}, null"
            raise ValueError(f"plain_rule is {value!r}; accepted: {accepted}")


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and value >= 0


def as_trained(entry: Entry, rates: Mapping[str, Any]) -> dict[str, Any]:
    """Settings found before, with what the entry gives in their place."""
    rates = canonical({"optimizer": rates}, entry.optimizer)["optimizer"]
    own, kept = entry.settings.get("optimizer", {}), given_by(entry)
    return {**rates, **{k: v for k, v in own.items() if k in kept or k in rates}}


def refine(
    entries: Sequence[Entry],
    rates: Mapping[str, Mapping[str, Any]],
    make: Callable[[Entry, Mapping[str, Any]], Run],
    run_all: RunAll,
    say: Say,
) -> dict[str, dict[str, Any]]:
    """Tries half, all and twice the `lr` that was found before, with everything else as found.

    While the best lies at an end, the next factor of two beyond it follows. The `lr` that an entry
    gives itself is not moved: nothing is tried of it.

    Args:
        entries: the methods.
        rates: found before, by label, as they are to be trained.
        make: the tuning run of a method with options of the optimizer.
        run_all: carries runs out.
        say: told of each round.

    Returns:
        As `tuning.tune`; of an entry with an `lr` of its own the rates as they are.
    """

    def next_factors(entry: Entry, losses: Mapping[float, float]) -> Sequence[float]:
        if "lr" in given_by(entry):
            return ()
        if not losses:
            return FACTORS
        return (_beyond(losses),) if len(losses) < MOST and _ends(losses) else ()

    def run_of(entry: Entry, factor: float) -> Run:
        return make(entry, _scaled(rates[entry.label], factor))

    known = search(entries, next_factors, run_of, run_all, say)
    return {
        label: _record(rates[label], losses) if losses else dict(rates[label])
        for label, losses in known.items()
    }


def _best(losses: Mapping[float, float]) -> float:
    return min(losses, key=lambda factor: (losses[factor], factor))


def _ends(losses: Mapping[float, float]) -> bool:
    """Whether the best factor is the smallest or the largest one."""
    return _best(losses) in (min(losses), max(losses))


def _beyond(losses: Mapping[float, float]) -> float:
    """The factor after the best one, away from the others."""
    best = _best(losses)
    return best / 2 if best == min(losses) else best * 2


def _record(rates: Mapping[str, Any], losses: Mapping[float, float]) -> dict[str, Any]:
    trials = {factor: trial(_scaled(rates, factor), losses[factor]) for factor in sorted(losses)}
    edge = ["lr"] if _ends(losses) else []
    found = {"tried": len(trials), "edge": edge, "trials": list(trials.values())}
    return {**trials[_best(losses)], **found}


def _scaled(options: Mapping[str, Any], factor: float) -> dict[str, Any]:
    return {**options, "lr": float(f"{options['lr'] * factor:.3g}")}
