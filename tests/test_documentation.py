"""README, documentation and site: commands parse, code runs, links lead somewhere."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
from representative import with_representative
from support import ROOT, tiny_model

from lowrank.optimizers.engine.method import TABLE
from lowrank.trainers.config import RunConfig

README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = [README, *sorted(DOCS.rglob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
#: Of `docs/recipes.md`.
SIZES = tuple(f"llama_{size}" for size in ("60m", "130m", "350m", "1b", "7b"))
SHELL = ("&", "&&", "|", ";", ">")
LINK = re.compile(r"(?<!!)\[[^\]]+\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)")
named = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def text(page: Path) -> str:
    return page.read_text("utf-8")


def blocks(page: Path, *languages: str) -> list[str]:
    return [code for language, code in BLOCK.findall(text(page)) if language in languages]


def commands(page: Path) -> list[list[str]]:
    """The words after `lowrank` of every command of it, also under torchrun."""
    code = "\n".join(blocks(page, "bash", "sh")).replace("\\\n", " ")
    indented = [line for line in text(page).splitlines() if line.startswith("    lowrank ")]
    found = []
    for line in [*code.splitlines(), *indented]:
        words = shlex.split(line, comments=True)
        for start in ("lowrank", "lowrank.trainers.cli"):
            if start in words:
                own = words[words.index(start) + 1 :]
                found.append(list(takewhile(lambda word: word not in SHELL, own)))
    return [words for words in found if words]


def test_the_readme_is_short() -> None:
    assert len(text(README).splitlines()) <= 120


@named
def test_commands_are_accepted(page: Path) -> None:
    """Flags and settings exist and fit together; nothing is run."""
    from lowrank.trainers.cli import _settings, parser
    from lowrank.trainers.compare.arguments import asked_for
    from lowrank.trainers.compare.entries import parse_methods
    from lowrank.trainers.pretrain import resolve

    for words in commands(page):
        options: argparse.Namespace = parser().parse_args(words)
        if options.command == "pretrain" and options.config is None:
            resolve(_settings(options))
        if options.command == "compare" and options.methods is not None:
            parse_methods(asked_for(options).methods)


RECIPES = DOCS / "recipes.md"


def recipe(size: str) -> tuple[RunConfig, list[str]]:
    """The run of a size's command, and the cells of its row."""
    from lowrank.trainers.cli import _settings, parser
    from lowrank.trainers.pretrain import resolve

    (words,) = [words for words in commands(RECIPES) if size in words]
    (row,) = re.findall(rf"^\| `{size}` \| (.*) \|$", text(RECIPES), re.MULTILINE)
    return resolve(_settings(parser().parse_args(words))), row.split(" | ")


@pytest.mark.parametrize("size", SIZES)
def test_recipes_are_what_their_table_says(size: str) -> None:
    config, (_, steps, tokens, batch, rank, _) = recipe(size)
    train = config.train
    assert batch == f"{train.batch_size} x {train.accumulation}"
    assert train.batch_size * train.accumulation * config.data.sequence_length == 131_072
    assert steps == f"{train.steps:,}"
    assert tokens == f"{train.steps * 131_072 / 1e9:.1f}B"
    assert rank == str(config.optimizer.options["rank"])


@pytest.mark.parametrize("size", with_representative(SIZES, ("llama_130m",)))
def test_recipes_are_planned_as_their_table_says(size: str) -> None:
    from lowrank.trainers.plan.planner import plan_run

    config, cells = recipe(size)
    assert cells[-1] == f"{plan_run(config, 1, 'cuda').peak / 1e9:.1f}"


def test_recipes_name_methods_that_exist() -> None:
    rows = re.findall(r"^\| `(\w+)`", text(RECIPES), re.MULTILINE)
    methods = [name for name in rows if not name.startswith("llama_")]
    assert len(methods) > 20
    assert set(methods) <= set(TABLE)


@named
def test_scripts_that_are_named_exist(page: Path) -> None:
    for path in re.findall(r"\./(scripts/[\w-]+)", text(page)):
        assert os.access(ROOT / path, os.X_OK), path


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_readme_s_code_runs() -> None:
    code = blocks(README, "python")
    assert len(code) >= 2
    for block in code:
        names: dict[str, Any] = {"model": tiny_model()}
        exec(compile(block, str(README), "exec"), names)
        assert names["optimizer"].param_groups


def anchors(page: Path) -> set[str]:
    """Names of a page's headings, as GitHub and mkdocs make them."""
    heads = re.findall(r"^#+ (.+)$", text(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@named
def test_links_lead_somewhere(page: Path) -> None:
    for path, anchor in LINK.findall(BLOCK.sub("", text(page))):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), path
        if anchor:
            assert anchor in anchors(target), f"{path}#{anchor}"


def test_every_method_has_notes() -> None:
    modules = {row.optimizer.__module__.rpartition(".")[2] for row in TABLE.values()}
    for path in (DOCS / "methods").glob("*.md"):
        assert path.stem in modules, path
        assert re.findall(r"^## (.*)$", text(path), re.MULTILINE) == ["When to use it", "Traps"]


class _References(HTMLParser):
    """What a page loads, and its links."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag == "a" and found.get("href"):
            self.links.append(found["href"] or "")
        for key in ("src", "href"):
            if tag in ("script", "img", "link", "iframe") and found.get(key):
                self.loaded.append(found[key] or "")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mkdocs") is None, reason="mkdocs is not installed")
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    pages = list(tmp_path.rglob("*.html"))
    modules = {row.optimizer.__module__.rpartition(".")[2] for row in TABLE.values()}
    assert modules <= {page.stem for page in pages if page.parent.name == "methods"}
    for page in pages:
        references = _References()
        references.feed(text(page))
        outside = [url for url in references.loaded if re.match(r"(https?:)?//", url)]
        assert not outside, f"{page.name} loads {outside}"
        for link in references.links:
            path = link.partition("#")[0]
            if path and not re.match(r"https?:|mailto:|/", path):
                assert (page.parent / path).resolve().exists(), f"{page.name}: {link}"
    galore = text(tmp_path / "methods" / "galore.html")
    assert "When to use it" in galore
    assert "update_proj_gap" in galore
    assert "CosineAnnealingLR" in text(tmp_path / "examples.html")


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("documentation.pages")


def test_plain_text_stays_as_it_is_read(pages: Any) -> None:
    assert pages.escaped("W <- a*b of `x_y` [1]") == r"W \<- a\*b of `x_y` \[1\]"
    linked = "arXiv [2403.03507](https://arxiv.org/abs/2403.03507)"
    assert pages.escaped("(arXiv 2403.03507)") == f"({linked})"
    assert pages.prose("a_b\n    W <- W_f\nc") == "a\\_b\n    W <- W_f\nc"


def test_arguments_of_a_docstring(pages: Any) -> None:
    section = "    lr: rate, float: or\n        tensor. Default 1.\n    betas: two.\n"
    assert pages.arguments(section) == {"lr": "rate, float: or tensor. Default 1.", "betas": "two."}


def test_links_change_outside_of_code(pages: Any) -> None:
    known = {"docs/a.md": "a.md"}
    page = "[a](docs/a.md#b) [c](CHANGELOG.md) [d](https://e)\n```python\nx[0](docs/a.md)\n```\n"
    assert pages.front_page(page, known) == (
        "[a](a.md#b) c (`CHANGELOG.md`) [d](https://e)\n```python\nx[0](docs/a.md)\n```\n"
    )


def test_every_method_s_page_has_its_rule_and_options(pages: Any) -> None:
    for module, rows in pages.method_modules().items():
        page = pages.method_page(module, "")
        for row in rows:
            assert f"## `{row.optimizer.__name__}`" in page
            assert f"| `{row.name}` |" in page
        assert "| `lr` | learning rate" in page
        assert "## Rule" in page
