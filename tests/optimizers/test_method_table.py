"""The table of methods: what it says is measured, and what is public comes from it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
from support import ROOT
from torch import nn

from lowrank import optimizers
from lowrank.optimizers import available, build, state_bytes
from lowrank.optimizers.engine.method import TABLE
from lowrank.optimizers.methods import __path__ as pages
from lowrank.trainers.methods import methods_page

SIZES = {"m": 192, "n": 320, "r": 48, "d": 0.05}
OPTIONS = {
    "galore_plus_adamw": {"heads": 4},
    "sltrain_adamw": {"density": SIZES["d"]},
    "sltrain_adamw_8bit": {"density": SIZES["d"], "min_8bit_size": 0},
}


def in_bytes(text: str, itemsize: int) -> float:
    """A formula of the table: "m r, and 2 n r bytes" is m r entries and 2 n r bytes."""
    total = 0.0
    for part in text.split(", and "):
        formula = part.removesuffix(" bytes")
        product = re.sub(r"(?<=[\w)]) (?=[\w(])", " * ", formula)
        unit = 1 if part.endswith(" bytes") else itemsize
        total += unit * eval(product, {"__builtins__": {}}, SIZES)
    return total


def one_matrix(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.Linear(int(SIZES["n"]), int(SIZES["m"]), bias=False, dtype=dtype)
    return nn.ModuleDict({"attn": layer})


@pytest.mark.parametrize("name", available())
def test_the_state_is_what_the_table_says(name: str) -> None:
    """Up to blocks' scales, counters and step counts, which take less than a twentieth."""
    optimizer = build(name, one_matrix(torch.float32), rank=SIZES["r"], **OPTIONS.get(name, {}))
    said = in_bytes(TABLE[name].state, 4)
    if not said:
        assert state_bytes(optimizer) == 4  # the step count
        return
    assert 1.0 <= state_bytes(optimizer) / said < 1.05


@pytest.mark.parametrize("name", available())
def test_the_weights_are_what_the_table_says(name: str) -> None:
    model = one_matrix(torch.bfloat16)
    build(name, model, rank=SIZES["r"], **OPTIONS.get(name, {}))
    found = 0
    for tensor in (*model.parameters(), *model.buffers()):
        parts = tensor.__tensor_flatten__()[0] if hasattr(tensor, "codes") else None
        found += sum(getattr(tensor, p).nbytes for p in parts) if parts else tensor.nbytes
    said = in_bytes(TABLE[name].weights or "m n", 2)
    assert 1.0 <= found / said < 1.05


def test_docs_hold_the_table() -> None:
    """`lowrank methods --markdown > docs/methods.md` writes it again."""
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert text == methods_page()


def test_the_readme_leads_to_the_table() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "(docs/methods.md)" in text


def test_every_page_enters_the_table_and_stays_short() -> None:
    for page in Path(pages[0]).glob("[!_]*.py"):
        modules = {row.optimizer.__module__.rpartition(".")[2] for row in TABLE.values()}
        assert page.stem in modules
        assert len(page.read_text(encoding="utf-8").splitlines()) < 260
        assert ast.get_docstring(ast.parse(page.read_text(encoding="utf-8")))


def test_every_class_is_public() -> None:
    for row in TABLE.values():
        assert getattr(optimizers, row.optimizer.__name__) is row.optimizer
        assert row.optimizer.__name__ in optimizers.__all__
        for spelling in row.spellings:
            assert getattr(optimizers, spelling) is row.optimizer


def test_type_checkers_see_every_class() -> None:
    tree = ast.parse(Path(optimizers.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name for node in block.body for alias in node.names}
    for row in TABLE.values():
        page = row.optimizer.__module__.rpartition(".")[2]
        name = row.optimizer.__name__
        assert name in seen, f"add: from .methods.{page} import {name} as {name}"
    assert len(seen) == len(TABLE)


def test_official_spellings() -> None:
    spellings = {s: row.optimizer.__name__ for row in TABLE.values() for s in row.spellings}
    assert spellings == {"APOLLOAdamW": "ApolloAdamW", "GaLoreLion": "OnlineSubspaceLion"}
