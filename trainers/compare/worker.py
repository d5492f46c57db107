"""A process that runs one training after another, each in a child of its own.

Importing torch and transformers takes longer than a short run; here it is done once, and each run
begins as a copy of this process, with memory and random numbers of its own. Requests come as lines
of JSON on standard input, and a line with the exit status answers each. When the input ends, as it
does however the comparison ends, the run at work is told to save itself.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

from ..files import write_text
from ..loop import TrainingError
from ..pretrain import Request, pretrain
from ..termination import Terminated

FAILED = "failed.json"
#: Exit status of a run that can't go on, and would not the next time either.
DIVERGED = 3
_PATIENCE = 60.0
_POLL = 0.05


def serve(source: TextIO, answers: TextIO) -> None:
    """Runs what the lines of `source` ask for until it ends."""
    # Loaded here, so that no run has to.
    import transformers.models.llama.modeling_llama  # noqa: F401

    for line in source:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            source.close()
            os._exit(_run(request))
        status = _wait(child, source)
        answers.write(json.dumps({"status": status}) + "\n")
        answers.flush()


def _wait(child: int, source: TextIO) -> int:
    """The child's exit status; it is ended where nobody is there any more to hear of it."""
    asked_at: float | None = None
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if asked_at is None:
            # While a run is at work no line comes: what can be read is the end.
            ready, _, _ = select.select([source], [], [], _POLL)
            if ready:
                os.kill(child, signal.SIGTERM)
                asked_at = time.monotonic()
        else:
            time.sleep(_POLL)
            if time.monotonic() - asked_at > _PATIENCE:
                os.kill(child, signal.SIGKILL)


def _run(request: dict[str, Any]) -> int:
    """One run, in the child."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    folder = Path(request["folder"])
    log = Path(request["log"])
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        console = Console(file=stream, width=100)
        try:
            pretrain(Request(request["settings"], folder, "auto", report=False), console)
        except TrainingError as error:
            write_text(folder / FAILED, json.dumps({"reason": str(error)}) + "\n")
            return DIVERGED
        except Terminated as end:
            stream.write(f"{end}\n")
            return 128 + signal.SIGTERM
        except BaseException as error:
            traceback.print_exc(file=stream)
            stream.write(f"{type(error).__name__}: {' '.join(str(error).split())}\n")
            return 1
    if not request["keep_checkpoints"]:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return 0


if __name__ == "__main__":
    # Ctrl-C and SIGTERM are for the comparison's process, whose end is seen here.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    serve(sys.stdin, sys.stdout)
