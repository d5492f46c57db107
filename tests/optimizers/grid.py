"""How far each method's weights are from one process's, under each strategy, on 2 to 4 processes.

    PYTHONPATH=tests python tests/optimizers/grid.py --output FOLDER --docs docs/distributed.md

trains a small model for 30 steps of two micro-batches, clipped, with refreshes or events every few
steps, and writes `cells.jsonl` (one line a cell; a second call goes on where the first stopped) and
`table.md`, and the same table between the marks of a page. Entries are relative distances, the
largest of any parameter.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import warnings
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from forked import load, run, start
from fsdp2_runs import options_of
from sharded import block, distance, shard, tokens, train
from sharded import whole as unsharded
from test_fsdp2_layers import COMMON, EVERY
from test_zero import engine_of, go_on, whole
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from lowrank.optimizers import available, build, convert, merge

STRATEGIES = ("DDP", "FSDP2", "ZeRO 0", "ZeRO 1", "ZeRO 2", "ZeRO 3")
STEPS = 30
#: Cells between collections of garbage, which take as long as a cell.
TOGETHER = 8
#: Around the table in a page.
MARKS = "<!-- made by tests/optimizers/grid.py -->", "<!-- end -->"
#: Method, strategy, number of processes.
Cell = tuple[str, str, int]
Weights = dict[str, Tensor]


def options(name: str) -> dict[str, Any]:
    """What a method is built with; the tests say why each is needed."""
    layers = dict(EVERY)
    if name in layers:
        return {**COMMON, **layers[name]}
    return options_of((name, {"update_proj_gap": COMMON["update_proj_gap"]}))


def dense(name: str, state: dict[str, Any]) -> Weights:
    """The weights of a model's state dict; of converted layers those of the merged ones."""
    if dist.is_initialized() and dist.get_rank():
        return {}  # the first process alone compares them
    twin = convert(name, block(), **options(name))
    twin.load_state_dict(state)
    return unsharded(merge(twin))


def alone(name: str) -> Weights:
    """One process's weights."""
    model = block()
    train(model, build(name, model, **options(name)), range(STEPS))
    return dense(name, model.state_dict())


def replicated(name: str, rank: int, world: int) -> Weights:
    """Weights under `DistributedDataParallel`."""
    model = block()
    optimizer = build(name, model, **options(name))
    parallel = DistributedDataParallel(model)
    for step in range(STEPS):
        for part in range(2):
            rows = tokens(step, part)
            own = rows[rank * len(rows) // world : (rank + 1) * len(rows) // world]
            with parallel.no_sync() if part == 0 else nullcontext():
                logits = parallel(own[:, :-1])
                loss = functional.cross_entropy(logits.flatten(0, 1), own[:, 1:].flatten())
                (loss / 2).backward()
        nn.utils.clip_grad_norm_(parallel.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return dense(name, model.state_dict())


def sharded(name: str, rank: int, world: int) -> Weights:
    """Weights under `fully_shard`."""
    mesh = DeviceMesh("cpu", torch.arange(world))
    model = shard(convert(name, block(), **options(name)), mesh)
    train(model, build(name, model, **options(name)), range(STEPS), rank, world)
    state = model.state_dict().items()
    gathered = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in state}
    return dense(name, gathered)


def partitioned(name: str, stage: int, rank: int, world: int) -> Weights:
    """Weights under DeepSpeed's ZeRO."""
    model = block()
    engine = engine_of(model, build(name, model, **options(name)), stage, world)
    go_on(engine, range(STEPS), rank, world)
    return dense(name, {**model.state_dict(), **whole(model)})


def trained(cell: Cell, rank: int) -> Weights:
    """Weights of a cell."""
    name, strategy, world = cell
    if strategy == "DDP":
        return replicated(name, rank, world)
    if strategy == "FSDP2":
        return sharded(name, rank, world)
    return partitioned(name, int(strategy.split()[1]), rank, world)


def fill(rank: int, world: int, folder: Path, cells: list[Cell], alone_at: Path, log: Path) -> None:
    """Trains cells in turn; rank 0 appends a line to `log` for each."""
    wanted: dict[str, Weights] = torch.load(alone_at, weights_only=True)
    warnings.simplefilter("ignore")
    gc.collect()
    gc.freeze()  # what libraries have made need not be looked at again
    for position, cell in enumerate(cells):
        try:
            found: Any = trained(cell, rank)
        except ValueError as error:  # on all processes alike
            found = str(error)
        if rank == 0:
            gap = distance(found, wanted[cell[0]]) if isinstance(found, dict) else found
            with log.open("a") as stream:
                stream.write(json.dumps([*cell, gap]) + "\n")
        if position % TOGETHER == TOGETHER - 1:
            gc.collect()
        dist.barrier()


def singles(_: int, names: list[str], path: str) -> None:
    """One process's weights of each method, in a process of its own."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    torch.save({name: alone(name) for name in names}, path)


def read(log: Path) -> dict[Cell, float | str]:
    """The cells that are done."""
    lines = log.read_text().splitlines() if log.exists() else []
    return {(name, strategy, world): gap for name, strategy, world, gap in map(json.loads, lines)}


def table(done: dict[Cell, float | str], worlds: Sequence[int]) -> str:
    """The cells as Markdown: a row a method, a column a strategy and number of processes."""

    def shown(gap: float | str | None) -> str:
        return "-" if gap is None else "refused" if isinstance(gap, str) else f"{gap:.0e}"

    names = sorted({name for name, _, _ in done})
    columns = [(strategy, world) for strategy in STRATEGIES for world in worlds]
    lines = [["method", *(f"{strategy}, {world}" for strategy, world in columns)]]
    lines += [["---"] * len(lines[0])]
    lines += [[name, *(shown(done.get((name, *column))) for column in columns)] for name in names]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def put(made: str, page: str) -> str:
    """A page with another table between its marks."""
    before, _, rest = page.partition(MARKS[0])
    _, found, after = rest.partition(MARKS[1])
    if not found:
        raise ValueError(f"a page without {MARKS[0]!r} and {MARKS[1]!r} after it")
    return f"{before}{MARKS[0]}\n\n{made}\n{MARKS[1]}{after}"


def main(arguments: Iterable[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--methods", default=",".join(available()))
    parser.add_argument("--strategies", default=",".join(STRATEGIES))
    parser.add_argument("--ranks", default="2,4,3")
    parser.add_argument("--docs", type=Path, help="a page with the marks of the table")
    chosen = parser.parse_args(None if arguments is None else list(arguments))
    load(["deepspeed"])
    names, worlds = chosen.methods.split(","), [int(size) for size in chosen.ranks.split(",")]
    folder: Path = chosen.output
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "cells.jsonl"
    done = read(log)
    strategies = chosen.strategies.split(",")
    left = {
        world: [(n, s, world) for s in strategies for n in names if (n, s, world) not in done]
        for world in worlds
    }
    needed = sorted({name for cells in left.values() for name, _, _ in cells})
    path = folder / "alone.pt"
    if not (path.exists() and set(needed) <= torch.load(path, weights_only=True).keys()):
        start(singles, (needed, str(path)), 1)
    for world, cells in left.items():
        if cells:
            with TemporaryDirectory() as place:
                run(fill, world, Path(place), cells, path, log)
    made = table(read(log), sorted({world for _, _, world in read(log)}))
    (folder / "table.md").write_text(made)
    if chosen.docs is not None:
        chosen.docs.write_text(put(made, chosen.docs.read_text()))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
