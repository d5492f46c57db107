"""Plans as text: one in full, or several in order."""

from __future__ import annotations

from collections.abc import Sequence

from .result import CATEGORIES, PHASES, Plan

_GB = 1e9
#: What a heading says of autocast.
AUTOCAST = "products in bfloat16"


def table(plan: Plan) -> str:
    """A plan's bytes by category and phase, and what follows from them."""
    kinds = [kind for kind in CATEGORIES if any(plan.phases[name][kind] for name in PHASES)]
    rows = [["GB", *PHASES]]
    rows += [[kind, *(gigabytes(plan.phases[name][kind]) for name in PHASES)] for kind in kinds]
    rows.append(["together", *(gigabytes(plan.peaks[name]) for name in PHASES)])
    return "\n".join([_heading(plan), "", *columns(rows), "", *_conclusions(plan)])


def _heading(plan: Plan) -> str:
    setting = plan.setting
    words = [
        f"{plan.model}, {plan.optimizer}: {plan.parameters:,} trained numbers",
        str(setting["dtype"]),
        f"{setting['batch']} x {setting['sequence']:,} tokens",
    ]
    if setting["accumulation"] > 1:
        words.append(f"{setting['accumulation']} micro-batches")
    if setting["autocast"]:
        words.append(AUTOCAST)
    if setting["checkpointing"]:
        words.append("activation checkpointing")
    if setting["update_in_backward"]:
        words.append("update in backward")
    if setting["refit"] == "first":
        words.append("bases of the first micro-batch")
    if setting["strategy"]:
        words.append(f"{setting['world']} processes ({setting['strategy']}), bytes of each")
    return ", ".join(words)


def _conclusions(plan: Plan) -> list[str]:
    where = max(PHASES, key=lambda name: plan.peaks[name])
    lines = [f"peak {gigabytes(plan.peak)} GB, in {where}"]
    if plan.slack.high:
        low, high = plan.peak + plan.slack.low, plan.peak + plan.slack.high
        lines[0] += (
            f"; with {gigabytes(plan.slack.low)} to {gigabytes(plan.slack.high)} GB for CUDA itself"
            f" and its allocator: {gigabytes(low)} to {gigabytes(high)} GB"
        )
    if plan.between_refits is not None:
        lines.append(
            f"peak of steps without refits: {gigabytes(plan.between_refits)} GB, as projected "
            "gradients are kept between micro-batches"
        )
    if plan.memory is not None:
        said = {
            "yes": "fits",
            "barely": "may fit, with the least of the allocator's slack",
            "no": "does not fit",
        }
        lines.append(f"{said[str(plan.fits)]} in {gigabytes(plan.memory)} GB")
        if plan.largest_batch:
            lines.append(f"largest micro-batch that fits: {plan.largest_batch}")
        else:
            lines.append("no micro-batch surely fits")
    lines.append(f"{plan.tokens_per_step:,} tokens a step")
    if plan.wire is not None:
        own = plan.wire["optimizer"]
        step = "no formula for" if own is None else f"{gigabytes(own)} GB in"
        lines.append(
            f"each process hands {gigabytes(plan.wire['passes'] or 0)} GB to collectives in the"
            f" passes of a step, {step} the optimizer's step between refreshes"
        )
    return lines + [f"note: {note}" for note in plan.notes]


def ranking(plans: Sequence[Plan]) -> str:
    """Several plans of one model, in the order given, one a line."""
    limited = plans[0].memory is not None
    head = ["optimizer", "peak GB", "in", "weights", "gradients", "state", "step adds", "refresh"]
    rows = [head + (["fits", "largest batch"] if limited else [])]
    for plan in plans:
        where = max(PHASES, key=lambda name: plan.peaks[name])
        step = plan.phases["step"]
        row = [
            plan.optimizer,
            gigabytes(plan.peak),
            where,
            gigabytes(step["weights"]),
            gigabytes(step["gradients"]),
            gigabytes(plan.state),
            gigabytes(step["scratch"]),
            gigabytes(plan.phases["refresh"]["scratch"]),
        ]
        rows.append(row + ([str(plan.fits), str(plan.largest_batch)] if limited else []))
    return "\n".join(columns(rows))


def columns(rows: list[list[str]]) -> list[str]:
    """Rows of cells as lines, the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        others = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        lines.append("  ".join([row[0].ljust(widths[0]), *others]).rstrip())
    return lines


def gigabytes(size: int) -> str:
    """Gigabytes of 10^9 bytes, with three digits that count."""
    value = size / _GB
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"
