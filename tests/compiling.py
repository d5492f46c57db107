"""Compilers for tests: what was compiled once in a session is not compiled again."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

#: The environment variable with the folder of the session's objects; see conftest.py.
OBJECTS = "LOWRANK_TEST_OBJECTS"
#: For libraries that are made and looked at, and hardly run: takes half the time.
UNOPTIMISED = "-O0"


def caching_compiler(compiler: str, *more: str) -> str:
    """A program that takes the compiler's place, with more options; see cached_compiler.py."""
    folder = Path(os.environ[OBJECTS])
    script = folder / "".join([Path(compiler).name, *more])
    if not script.exists():
        wrapper = Path(__file__).with_name("cached_compiler.py")
        command = shlex.join([sys.executable, "-S", "-P", str(wrapper), str(folder), compiler])
        partial = folder / f"{script.name}.{os.getpid()}"
        partial.write_text(f'#!/bin/sh\nexec {command} "$@" {shlex.join(more)}\n')
        partial.chmod(0o755)
        os.replace(partial, script)
    return str(script)


def made_before(compiler: str, library: Path) -> str:
    """A program that takes a compiler's place and links a library that is there already.

    For builds whose files are counted: compiling takes longer than all else in them.
    """
    script = Path(os.environ[OBJECTS]) / f"made-before-{library.name}"
    partial = script.with_name(f"{script.name}.{os.getpid()}")
    lines = [
        "#!/bin/sh",
        "for last; do :; done",
        'case " $* " in',
        '  *" -c "*) : > "$last" ;;',
        f'  *" -shared "*) cp {shlex.quote(str(library))} "$last" ;;',
        f'  *) exec {shlex.quote(compiler)} "$@" ;;',
        "esac",
    ]
    partial.write_text("\n".join(lines) + "\n")
    partial.chmod(0o755)
    os.replace(partial, script)
    return str(script)
