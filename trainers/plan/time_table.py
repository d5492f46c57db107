"""Modelled times as text: one method in parts, or several in order."""

from __future__ import annotations

from collections.abc import Sequence

from lowrank.optimizers.registry import without_effect

from .sharded import quantised_bits
from .table import AUTOCAST, columns
from .timing import NotModelled, StepTime
from .work import SOLVERS

MODELLED = "modelled, not measured"


def time_table(made: StepTime) -> str:
    """A method's step by its parts, and what follows from them."""
    setting = made.setting
    words = [
        f"{made.model}, {made.optimizer}, on {made.speed.name} ({MODELLED})",
        str(setting["dtype"]),
        f"{setting['batch']} x {setting['sequence']:,} tokens",
    ]
    if _rank(made) != "-":
        words.append(f"rank {_rank(made)}")
    bits = quantised_bits(made.optimizer, setting["options"])
    if bits is not None:
        words.append(f"weights in {bits} bits")
    if setting["accumulation"] > 1:
        words.append(f"{setting['accumulation']} micro-batches")
    if setting["autocast"]:
        words.append(AUTOCAST)
    if setting["checkpointing"]:
        words.append("activation checkpointing")
    if setting["strategy"]:
        words.append(f"{setting['world']} processes ({setting['strategy']})")
    rows = [["", "launches", "ms device", "ms host", "ms"]]
    for part in (made.passes, made.step, *([] if made.refreshing is None else [made.refreshing])):
        times = [milliseconds(t) for t in (part.device, part.host, part.seconds)]
        rows.append([part.name, f"{part.launches:,.0f}", *times])
    if made.refreshing is not None:
        label = f"refresh, what it adds / {made.gap} steps"
        rows.append([label, "", "", "", milliseconds(made.refresh)])
    if made.wire is not None:
        rows.append(["collectives", "", "", "", milliseconds(made.wire)])
    rows.append(["a step on average", "", "", "", milliseconds(made.seconds)])
    return "\n".join([", ".join(words), "", *columns(rows), "", *_conclusions(made)])


def _conclusions(made: StepTime) -> list[str]:
    per_second = made.tokens / made.seconds
    share = made.optimizer_seconds / made.seconds
    lines = [
        f"{per_second:,.0f} tokens a second; the optimizer takes {share:.1%} of a step",
    ]
    if made.refreshing is not None:
        lines.append(f"a step in which all bases are refitted takes {milliseconds(made.worst)} ms")
    lines.append(
        f"the optimizer's step between refreshes as a replayed CUDA graph, where it can be one: "
        f"{milliseconds(made.captured)} ms"
    )
    lines.append(_assumptions(made))
    return lines + [f"note: {note}" for note in made.notes]


def _assumptions(made: StepTime) -> str:
    speed = made.speed
    costs = f"{1e6 * speed.launch:.3g} us of the host and {1e6 * speed.kernel:.3g} us of the card"
    shares = ", ".join(f"{share:.0%} for {name}" for name, share in speed.assumed.items())
    told = f"shares of the data sheet's rates: {shares}; " if shares else ""
    solvers = f"; eigenvalues and SVDs run at {SOLVERS:.0%} of the rate of products"
    return f"assumed: {told}a launch takes at least {costs}{solvers}"


def ranking_of_times(found: Sequence[StepTime | NotModelled]) -> str:
    """Several methods with one model, in the order given, one a line."""
    rows = [
        [
            "optimizer",
            "rank",
            "launches",
            "optimizer ms",
            "refresh ms",
            "step ms",
            "tokens/s",
            "share",
        ]
    ]
    lacking: dict[str, list[str]] = {}
    first: StepTime | None = None
    for one in found:
        if isinstance(one, NotModelled):
            why = one.why.removeprefix(f"optimizer={one.optimizer!r} ")
            lacking.setdefault(why, []).append(one.optimizer)
            continue
        first = first or one
        rows.append(
            [
                one.optimizer,
                _rank(one),
                f"{one.step.launches:,.0f}",
                milliseconds(one.optimizer_seconds),
                milliseconds(one.refresh),
                milliseconds(one.seconds),
                f"{one.tokens / one.seconds:,.0f}",
                f"{one.optimizer_seconds / one.seconds:.1%}",
            ]
        )
    about = [] if first is None else ["", f"on {first.speed.name}, {MODELLED}", _assumptions(first)]
    notes = _notes([one for one in found if isinstance(one, StepTime)])
    left = [f"not modelled: {', '.join(names)}: {why}" for why, names in lacking.items()]
    return "\n".join([*columns(rows), *about, *notes, *left])


def _notes(found: Sequence[StepTime]) -> list[str]:
    """Each note once, with the methods that it is about, unless it is about all."""
    about: dict[str, list[str]] = {}
    for one in found:
        for note in one.notes:
            about.setdefault(note, []).append(one.optimizer)
    return [
        f"note: {note}" if len(names) == len(found) else f"note: {', '.join(names)}: {note}"
        for note, names in about.items()
    ]


def _rank(made: StepTime) -> str:
    """The rank that a preset or an option says; methods of a preset have different ones."""
    options = made.setting["options"]
    if "rank" in without_effect(made.optimizer, options):
        return "-"
    return str(options.get("rank", "-"))


def milliseconds(seconds: float) -> str:
    """Milliseconds with three digits that count."""
    value = 1e3 * seconds
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"
