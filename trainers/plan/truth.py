"""A plan beside what real steps take."""

from __future__ import annotations

from .measure import Measured, measure
from .record import Record
from .result import PHASES, Plan
from .table import columns, gigabytes


def measured(plan: Plan, record: Record | None = None) -> Measured:
    """Takes a few real steps of what was planned, on this machine.

    Args:
        plan: what was planned.
        record: of earlier measurements, in which it is looked up and written down.

    Raises:
        ValueError: the plan is of several processes.
    """
    setting = plan.setting
    if setting["world"] > 1:
        raise ValueError(f"measuring with world={setting['world']}: accepted is one process")
    known = None if record is None else record.find(plan)
    if known is not None:
        return known
    found = measure(
        plan.model,
        plan.optimizer,
        sequence=setting["sequence"],
        batch=setting["batch"],
        accumulation=setting["accumulation"],
        device=setting["device"],
        dtype=setting["dtype"],
        checkpointing=setting["checkpointing"],
        autocast=setting["autocast"],
        update_in_backward=setting["update_in_backward"],
        refit=setting["refit"],
        options=setting["options"],
    )
    if record is not None:
        record.add(plan, found)
    return found


def beside(plan: Plan, found: Measured) -> str:
    """Predicted and measured bytes as a table."""
    step = plan.phases["step"]
    rows = [["", "predicted GB", "measured GB", "off by"]]
    pairs = [
        ("weights", step["weights"], found.weights),
        ("state", plan.state, found.state),
        *((name, plan.peaks[name], found.peaks[name]) for name in PHASES if name in found.peaks),
    ]
    for name, predicted, real in pairs:
        off = "exact" if predicted == real else f"{predicted / real - 1:+.2%}"
        rows.append([name, gigabytes(predicted), gigabytes(real), off])
    return "\n".join(columns(rows))


def line(plan: Plan | None, found: Measured | None) -> str:
    """A row of a markdown table of methods: measured MB, and how far the plan is off; its head."""
    if plan is None or found is None:
        head = f"| method | weights, gradients, state | {' | '.join(PHASES)} |"
        return f"{head}\n|---|---|{'---|' * len(PHASES)}"
    step = plan.phases["step"]
    pairs = (
        (step["weights"], found.weights),
        (max(step["gradients"], plan.phases["refresh"]["gradients"]), found.gradients),
        (plan.state, found.state),
    )
    exact = "exact" if all(predicted == real for predicted, real in pairs) else "differ"
    cells = []
    for name in PHASES:
        real = found.peaks.get(name)
        off = "" if real is None else f" ({plan.peaks[name] / real - 1:+.2%})"
        cells.append("" if real is None else f"{real / 1e6:.1f}{off}")
    return f"| `{plan.optimizer}` | {exact} | {' | '.join(cells)} |"
