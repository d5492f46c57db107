"""The subcommand `lowrank plan`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .plan import Plan
    from .plan.record import Record

_TEXT = """\
Says what a run takes before anything is allocated: bytes by category and phase, whether they fit,
the largest micro-batch that does, and what several processes send. docs/memory.md says how true it
is. With --time it says how long a step should take on a card instead (docs/time.md).
"""
_EXAMPLES = """\
examples:
  lowrank plan --model llama_7b --optimizer galore_adamw_8bit --card 4090 --update-in-backward
  lowrank plan --model llama_1b --all --memory 16GB --plot methods.png
  lowrank plan --model ../model/config.json --optimizer fira_adamw --memory 80GB --option rank=256
  lowrank plan --model llama_7b --optimizer galore_adamw --world 8 --strategy fsdp2 --card H100
  lowrank plan --model llama_9m --optimizer galore_adamw --sequence 256 --device cpu --measure
  lowrank plan --model llama_7b --optimizer galore_adamw --card H100 --time
"""


def add_parser(commands: Any) -> None:
    """Adds the subcommand to the command line's."""
    plan = commands.add_parser(
        "plan",
        help="say what memory or time a run takes",
        description=_TEXT,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    plan.set_defaults(run=run)
    add = plan.add_argument
    add("--model", metavar="NAME|FILE", default="llama_9m", help="a preset, or a config.json")
    which = plan.add_mutually_exclusive_group()
    which.add_argument("--optimizer", metavar="NAME", help="default galore_adamw")
    which.add_argument("--all", action="store_true", help="every method, least memory first")
    size = plan.add_mutually_exclusive_group()
    size.add_argument("--memory", metavar="SIZE", help="what there is: 16GB, 16GiB")
    size.add_argument("--card", metavar="NAME", help="a card's instead: 4090, H100, A100-40GB")
    add("--sequence", metavar="N", type=int, default=2048, help="tokens of a sequence (2048)")
    add("--batch", metavar="N", type=int, default=1, help="sequences of a micro-batch (1)")
    add("--accumulation", metavar="N", type=int, default=1, help="micro-batches of a step (1)")
    add("--world", metavar="N", type=int, default=1, help="processes (1)")
    add("--strategy", metavar="NAME", help="ddp or fsdp2, with several processes")
    add("--device", metavar="NAME", default="cuda", help="cuda (default) or cpu")
    add("--dtype", metavar="NAME", help="float32 or bfloat16 (default: the model's)")
    add("--weight-bits", metavar="N", type=int, help="16, 8 or 4 (default: the method's)")
    add(
        "--checkpointing",
        action=argparse.BooleanOptionalAction,
        help="recompute each block in the backward pass (default: the preset's choice)",
    )
    add("--autocast", action="store_true", help="products in bfloat16 over float32 weights")
    add(
        "--update-in-backward",
        action="store_true",
        help="free gradients as they are used; with accumulation, in the last micro-batch",
    )
    add(
        "--refit",
        metavar="WHICH",
        default="whole",
        help="with --update-in-backward, what bases are fitted to: the whole gradient of a step"
        " (default), or that of its first micro-batch, which keeps less",
    )
    add(
        "--option",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        dest="options",
        help="an option of the method, such as rank=256; repeat it for more",
    )
    add("--time", action="store_true", help="with --card: model a step's time instead")
    add("--plot", metavar="FILE", type=Path, help="with --all: a chart, as .png, .svg or .pdf")
    add("--json", action="store_true", help="print numbers for programs")
    add("--measure", action="store_true", help="print what real steps take beside it")
    add(
        "--record",
        metavar="FILE",
        type=Path,
        help="with --measure: write there what is measured, and measure nothing that it has",
    )


def run(options: argparse.Namespace) -> None:
    """Plans what the command line says and prints it.

    Raises:
        ValueError: something is unknown, out of range, or doesn't go together.
    """
    from .plan import plan, rank
    from .plan.chart import chart, check_place
    from .plan.record import Record
    from .plan.table import ranking, table

    if options.plot is not None and not options.all:
        raise ValueError(f"--plot {options.plot}: accepted with --all")
    if options.plot is not None:
        check_place(options.plot)
    if options.record is not None and not options.measure:
        raise ValueError(f"--record {options.record}: accepted with --measure")
    record = None if options.record is None else Record(options.record)
    arguments = {
        name: getattr(options, name)
        for name in (
            *("memory", "card", "sequence", "batch", "accumulation", "world", "strategy"),
            *("device", "dtype", "weight_bits", "checkpointing", "autocast", "update_in_backward"),
            "refit",
        )
    }
    arguments["options"] = _options(options.options)
    if options.time:
        _time(options, arguments)
        return
    if options.all:
        plans = rank(options.model, **arguments)
        if options.plot is not None:
            chart(plans, options.plot)
        if options.measure:
            _measure_all(plans, record, options.json)
            return
        _print([made.to_dict() for made in plans] if options.json else ranking(plans))
        return
    made = plan(
        options.model,
        "galore_adamw" if options.optimizer is None else options.optimizer,
        **arguments,
    )
    if not options.measure:
        _print(made.to_dict() if options.json else table(made))
        return
    from .plan.truth import beside, measured

    found = measured(made, record)
    if options.json:
        _print({**made.to_dict(), "measured": dict(found.peaks)})
    else:
        _print(f"{table(made)}\n\n{beside(made, found)}")


def _time(options: argparse.Namespace, arguments: dict[str, Any]) -> None:
    """Prints modelled times."""
    from .plan.time_table import ranking_of_times, time_table
    from .plan.timing import rank_times, step_time

    for name, given in (("--plot", options.plot), ("--measure", options.measure)):
        if given:
            raise ValueError(f"{name} with --time: times are modelled; accepted is one of the two")
    if options.all:
        found = rank_times(options.model, **arguments)
        _print([one.to_dict() for one in found] if options.json else ranking_of_times(found))
        return
    made = step_time(options.model, options.optimizer or "galore_adamw", **arguments)
    _print(made.to_dict() if options.json else time_table(made))


def _measure_all(plans: Sequence[Plan], record: Record | None, as_json: bool) -> None:
    """Prints each method's measured peaks as soon as they are known."""
    from .plan.truth import line, measured

    if not as_json:
        _print(line(None, None))
    rows = []
    for made in plans:
        found = measured(made, record)
        if as_json:
            rows.append({**made.to_dict(), "measured": dict(found.peaks)})
        else:
            _print(line(made, found))
    if as_json:
        _print(rows)


def _options(texts: list[str]) -> dict[str, Any]:
    """Options from KEY=VALUE, with values as in YAML."""
    from .config_io import parse_override

    found: dict[str, Any] = {}
    for text in texts:
        key, sign, _ = text.partition("=")
        if not sign or not key or "." in key:
            raise ValueError(f"--option {text!r}: accepted is KEY=VALUE, such as rank=256")
        found |= parse_override(f"optimizer.{text}")["optimizer"]
    return found


def _print(what: Any) -> None:
    text = what if isinstance(what, str) else json.dumps(what, indent=2)
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
