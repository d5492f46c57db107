"""Compilers for tests: what was compiled once in a session is not compiled again."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

#: The environment variable with the folder of the session's objects; see conftest.py.
OBJECTS = "LOWRANK_TEST_OBJECTS"


def caching_compiler(compiler: str) -> str:
    """A program that takes the compiler's place; see cached_compiler.py."""
    folder = Path(os.environ[OBJECTS])
    script = folder / Path(compiler).name
    if not script.exists():
        wrapper = Path(__file__).with_name("cached_compiler.py")
        command = shlex.join([sys.executable, "-S", "-P", str(wrapper), str(folder), compiler])
        partial = folder / f"{script.name}.{os.getpid()}"
        partial.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        partial.chmod(0o755)
        os.replace(partial, script)
    return str(script)
