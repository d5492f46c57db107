"""A compiler that compiles the same source with the same options once in a session of tests.

    python cached_compiler.py FOLDER COMPILER ARGUMENTS...

Objects are kept in FOLDER under a hash of what they are made of: the compiler and its version, the
options, and the source with all that it includes by name in quotation marks. All else is passed on
to the compiler. Several builds of the tests (of wheels, of the libraries) compile the same files,
which takes most of their time.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

_INCLUDE = re.compile(rb'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)


def main(folder: str, compiler: str, *arguments: str) -> int:
    """Compiles, or copies an object that is there; returns the compiler's exit status."""
    if "-c" not in arguments or "-o" not in arguments:
        return subprocess.run([compiler, *arguments], check=False).returncode
    target, source = (arguments[arguments.index(option) + 1] for option in ("-o", "-c"))
    kept = Path(folder) / key(compiler, arguments, Path(source), target)
    with open(f"{kept}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # others wait for the first one
        if not kept.exists():
            code = subprocess.run([compiler, *arguments], check=False).returncode
            if code:
                return code
            shutil.copy(target, f"{kept}.partial")
            os.replace(f"{kept}.partial", kept)
            return 0
    shutil.copy(kept, target)
    return 0


def key(compiler: str, arguments: Sequence[str], source: Path, target: str) -> str:
    """The hash of what an object is made of."""
    state = hashlib.sha256()
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    flags = [argument for argument in arguments if argument not in (str(source), target)]
    names = ("NVCC_APPEND_FLAGS", "NVCC_PREPEND_FLAGS", "CPATH", "CPLUS_INCLUDE_PATH")
    settings = [f"{name}={os.environ.get(name)}" for name in names]
    state.update(repr([compiler, version, flags, settings, source.name]).encode())
    folders = [Path(flag[2:]) for flag in flags if flag.startswith("-I")]
    for path in included(source, folders):
        state.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return state.hexdigest()


def included(source: Path, folders: Sequence[Path]) -> Iterator[Path]:
    """The source and what it includes, each once, in the order in which they are met."""
    waiting, seen = [source], set[Path]()
    while waiting:
        path = waiting.pop().resolve()
        if path in seen:
            continue
        seen.add(path)
        yield path
        for name in _INCLUDE.findall(path.read_bytes()):
            places = [folder / os.fsdecode(name) for folder in (path.parent, *folders)]
            waiting += [place for place in places if place.is_file()][:1]


if __name__ == "__main__":
    # A sanitizer that is loaded into the tests' process would watch the compiler too.
    os.environ.pop("LD_PRELOAD", None)
    sys.exit(main(*sys.argv[1:]))
