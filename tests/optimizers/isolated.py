"""Runs the cases of `mid_training_cases.py` where they can't end the tests: in forked processes.

`python tests/optimizers/isolated.py quick|all [METHOD ...]`, with the environment that
`test_options_mid_training.py` gives it, prints a JSON line for each method: the number of cases,
and {case: what is wrong}. Cases of a method share a process until one kills it or hangs; that one
is run alone then, so that damage to the heap by others is not blamed on it. This process has one
thread, so that forking it is safe, and has imported all that torch imports late.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import resource
import signal
import sys
from collections.abc import Sequence

from mid_training import LOADED, Case, check, reference
from mid_training_cases import cases
from table import TABLE, identifier

#: Seconds that a case may take, on a machine with much else to do.
SECONDS = 30


def _child(name: str, listed: Sequence[Case], positions: Sequence[int], out: int) -> None:
    """Judges cases and writes a line for each; never returns."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    with os.fdopen(out, "w") as lines:
        for position in positions:
            faulthandler.dump_traceback_later(SECONDS, exit=True)
            try:
                wrong = check(name, listed[position])
            except Exception as error:
                wrong = f"the check itself: {type(error).__name__}: {error}"
            lines.write(json.dumps([position, wrong]) + "\n")
            lines.flush()
    os._exit(0)


def _fork(
    name: str, listed: Sequence[Case], positions: Sequence[int]
) -> tuple[dict[int, str], str]:
    """What a child said of cases, and how it died, if it did."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        try:
            _child(name, listed, positions, writing)
        finally:
            os._exit(3)
    os.close(writing)
    with os.fdopen(reading) as lines:
        said = dict(json.loads(line) for line in lines.read().splitlines())
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return said, f"the process died: {signal.Signals(os.WTERMSIG(status)).name}"
    code = os.WEXITSTATUS(status)
    return said, f"the process ended with {code}: a hang or an exit" if code else ""


def judge(name: str, quick: bool) -> dict[str, object]:
    """The number of a method's cases, and what is wrong with which."""
    listed = cases(name, quick)
    wrong: dict[int, str] = {}
    left = list(range(len(listed)))
    while left:
        said, died = _fork(name, listed, left)
        wrong |= said
        left = left[len(said) :]
        if not died:
            continue
        if not left:
            raise RuntimeError(f"{name}: after its last case {died}")
        said, alone = _fork(name, listed, left[:1])
        wrong[left[0]] = alone or said[left[0]] or f"{died}, after others"
        left = left[1:]
    found = {listed[position].label: said for position, said in wrong.items() if said}
    return {"name": name, "cases": len(listed), "wrong": found}


def main() -> None:
    quick, names = sys.argv[1] == "quick", sys.argv[2:] or [identifier(row) for row in TABLE]
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for name in names:
        reference(name), reference(name, LOADED)
        gc.freeze()
        print(json.dumps(judge(name, quick)), flush=True)


if __name__ == "__main__":
    main()
