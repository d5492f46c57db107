"""Runs examples in forked processes, which share what takes longest: the imports.

`python tests/example_server.py` reads lines of JSON, `[PATH, PROCESSES]`, and answers each with
`[EXIT STATUS, OUTPUT]`. An example runs as `python PATH` or, with several processes, as each of
those that `torchrun` starts: with a main module and an environment of its own.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import sys
import tempfile
import traceback
from pathlib import Path
from typing import IO

#: Seconds that an example may take, on a machine with much else to do.
SECONDS = 240


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _child(path: Path, output: IO[bytes], variables: dict[str, str]) -> None:
    """Runs an example and never returns."""
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    signal.alarm(SECONDS)
    os.environ.update(variables)
    sys.argv = [str(path)]
    sys.path.insert(0, str(path.parent))
    status = 0
    try:
        runpy.run_path(str(path), run_name="__main__")
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run(path: Path, processes: int) -> tuple[int, str]:
    """The largest exit status of an example's processes, and what they wrote."""
    port = free_port()
    with tempfile.TemporaryFile() as output:
        children = []
        for rank in range(processes):
            torchrun = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(processes),
                "LOCAL_WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            child = os.fork()
            if not child:
                _child(path, output, torchrun if processes > 1 else {})
            children.append(child)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        output.seek(0)
        return max(abs(status) for status in statuses), output.read().decode(errors="replace")


def main() -> None:
    import torch
    import transformers

    import lowrank.optimizers  # noqa: F401 (for the children)

    # No threads yet, so that forking is safe; lazily imported modules are read now.
    for name in ("LlamaForCausalLM", "Trainer", "TrainingArguments", "PreTrainedTokenizerFast"):
        getattr(transformers, name)
    torch.set_num_threads(1)
    for line in sys.stdin:
        path, processes = json.loads(line)
        answer = json.dumps(run(Path(path), processes))
        sys.__stdout__.write(answer + "\n")  # type: ignore[union-attr]
        sys.__stdout__.flush()  # type: ignore[union-attr]
    os._exit(0)  # nothing to clean up, which takes libraries seconds


if __name__ == "__main__":
    main()
