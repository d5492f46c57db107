"""A plan beside what real steps take."""

from __future__ import annotations

from .measure import Measured, measure
from .result import PHASES, Plan
from .table import columns, gigabytes


def measured(plan: Plan) -> Measured:
    """Takes a few real steps of what was planned, on this machine.

    Raises:
        ValueError: the plan is of several processes.
    """
    setting = plan.setting
    if setting["world"] > 1:
        raise ValueError(f"measuring with world={setting['world']}: accepted is one process")
    return measure(
        plan.model,
        plan.optimizer,
        sequence=setting["sequence"],
        batch=setting["batch"],
        accumulation=setting["accumulation"],
        device=setting["device"],
        dtype=setting["dtype"],
        checkpointing=setting["checkpointing"],
        update_in_backward=setting["update_in_backward"],
        options=setting["options"],
    )


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
