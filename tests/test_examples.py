"""The examples of the documentation, run as the commands that they name would run them."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from representative import with_representative
from support import ROOT

FOLDER = ROOT / "docs" / "examples"
EXAMPLES = sorted(path.stem for path in FOLDER.glob("*.py") if path.name != "tiny.py")
#: Compiles for half a minute; `test_integrations.py` compiles less.
LONG = ("compiled_model",)
LOSSES = re.compile(r"loss (\d+\.\d+) -> (\d+\.\d+)")

Run = Callable[[Path, int], tuple[int, str]]


def tree(name: str) -> ast.Module:
    return ast.parse((FOLDER / f"{name}.py").read_text("utf-8"))


def command(name: str) -> list[str]:
    """The command in an example's docstring, without what it says to install."""
    text = ast.get_docstring(tree(name)) or ""
    (line,) = re.findall(r"^\s*(?:pip install [\w ]+ && )?((?:python|torchrun) .+)$", text, re.M)
    return shlex.split(line)


def processes(name: str) -> int:
    words = command(name)
    return int(words[words.index("--nproc-per-node") + 1]) if words[0] == "torchrun" else 1


def missing(name: str) -> list[str]:
    """What an example imports and isn't here."""
    names = set()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    own = {file.stem for file in FOLDER.glob("*.py")}
    return sorted(name for name in names - own if importlib.util.find_spec(name) is None)


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment = os.environ | settings
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "example_server.py")],
        cwd=ROOT,
        env=environment,
        text=True,
        **pipes,
    )
    assert server.stdin is not None
    assert server.stdout is not None

    def ask(path: Path, count: int) -> tuple[int, str]:
        server.stdin.write(json.dumps([str(path), count]) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        assert answer, f"the server of examples has ended with {server.wait()}"
        status, output = json.loads(answer)
        return status, output

    yield ask
    server.stdin.close()
    server.wait(60)


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_are_short_and_say_how_they_are_run(name: str) -> None:
    words = command(name)
    assert words[-1] == f"docs/examples/{name}.py"
    assert len((FOLDER / f"{name}.py").read_text("utf-8").splitlines()) <= 70


@pytest.mark.parametrize(
    "name", with_representative(EXAMPLES, [name for name in EXAMPLES if name not in LONG])
)
def test_examples_run_and_learn(name: str, run: Run) -> None:
    lacking = missing(name)
    if lacking:
        pytest.skip(f"{', '.join(lacking)} not installed")
    status, output = run(FOLDER / f"{name}.py", processes(name))
    assert status == 0, output[-4000:]
    losses = LOSSES.findall(output)
    assert losses, output[-4000:]
    assert all(float(last) < 0.8 * float(first) for first, last in losses), losses
