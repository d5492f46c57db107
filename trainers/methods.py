"""`lowrank methods`: the available optimizers, and the system."""

from __future__ import annotations

import platform

import torch
from rich.console import Console
from rich.table import Table

from lowrank.cuda import kernels, status
from lowrank.optimizers import available, describe, method_table

from .summary import package_version

PAGE = """# Methods

Sizes are those of an m x n matrix, m <= n, at rank r (SLTrain: of density d): entries in the
precision that a tensor has, or bytes. Scales of quantised blocks and step counts come to it;
`expected_state_bytes(name, model, **options)` counts everything. A class's page, named by
`help(CLASS)`, has its paper, its rule and its options.

The last column is what `update_in_backward(optimizer, accumulation)` keeps of a gradient between
micro-batches, with the method's own defaults: n r numbers where the method uses a gradient through
its projection alone (in the step of a refit all of it), m n where it uses the rest as well, and
always of what is not projected. `whole()` of the handle lists them with reasons.

{table}

`lowrank methods --markdown > docs/methods.md` wrote this page.
"""


def methods_page() -> str:
    """`docs/methods.md`."""
    return PAGE.format(table=method_table())


def print_methods(console: Console | None = None) -> None:
    """Prints every optimizer with a one-line description."""
    table = Table(box=None, pad_edge=False, show_header=False)
    for name in available():
        table.add_row(name, describe(name))
    (console or Console()).print(table, highlight=False)


def print_system(console: Console | None = None) -> None:
    """Prints versions, threads, CUDA devices, and the status of the compiled libraries."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_row("lowrank", package_version())
    table.add_row("torch", torch.__version__)
    table.add_row("python", platform.python_version())
    table.add_row("system", platform.platform())
    table.add_row("threads", str(torch.get_num_threads()))
    for index in range(torch.cuda.device_count()):
        table.add_row(f"cuda:{index}", torch.cuda.get_device_name(index))
    if not torch.cuda.is_available():
        table.add_row("cuda", "no device")
    table.add_row("kernels", kernels())
    for name in ("host", "cuda"):
        found = status(name)
        made = "compiled" if found.library else "not compiled"
        table.add_row(f"{name} library", f"{made}: {found.detail}")
    (console or Console()).print(table, highlight=False)
