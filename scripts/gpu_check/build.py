"""Compiles the native libraries into cuda/_lib, loads them, and calls each operation once."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from lowrank.cuda import build as native
from lowrank.cuda import library, occupancy, using_kernels

from .files import Json
from .record import Record
from .section import Context

#: A file that needs what the kernels need of nvcc and of its host compiler.
_PROBE = """
#include <cstdint>
#include <type_traits>
#include <utility>
template <typename F> __global__ void each(int n, F f) { if (threadIdx.x < n) f(threadIdx.x); }
int main() {
    each<<<1, 32>>>(32, [=] __device__(int i) { (void)i; });
    return std::is_same_v<int, std::int32_t> ? 0 : 1;
}
"""
_HOST_COMPILERS = (
    *(f"g++-{version}" for version in (15, 14, 13, 12, 11)),
    *(f"clang++-{version}" for version in (20, 19, 18, 17, 16, 15, 14)),
    "clang++",
)


def run(record: Record, context: Context) -> None:
    """Builds, loads and smokes; a library that fails is a failed check, and stops nothing."""
    record.attempt("compile", lambda: compile_libraries(record, context))
    names = ("cuda", "host") if context.on_gpu else ("host",)
    for name in names:
        device = context.device if name == "cuda" else torch.device("cpu")
        record.attempt(f"load {name}", functools.partial(_load, record, name, device))
    record.attempt("smoke", lambda: _smoke(record, context))


def compile_libraries(record: Record, context: Context) -> None:
    """Compiles in place what is not there yet, for this card too."""
    nvcc = native.find_nvcc()
    record.facts["nvcc"] = nvcc
    record.facts["architectures"] = target_architectures(context)
    folder = context.root / "cuda" / "_lib"
    begin = time.monotonic()
    if native.read_report(folder).get("digest") != native.digest():
        if not context.on_gpu:
            os.environ.setdefault("LOWRANK_CUDA", "0")  # a CPU needs the host's library alone
        elif nvcc is not None:
            record.facts["host_compiler"] = choose_host_compiler(nvcc)
    output: list[tuple[str, float]] = []
    with timed(output):
        report = native.build(folder)
    seconds = time.monotonic() - begin
    record.facts["report"] = report
    record.add("build", "compiled" if output else "already there", seconds, "s")
    record.facts["commands"] = [{"file": name, "seconds": s} for name, s in output]
    said = folder / native.SAID
    found = occupancy.read(said.read_text() if said.exists() else "")
    record.facts["registers"] = [dataclasses.asdict(kernel) for kernel in found]
    problems = [problem for kernel in found if (problem := kernel.problem())]
    for target in sorted({kernel.target for kernel in found}):
        own = [kernel for kernel in found if kernel.target == target]
        worst = min(own, key=lambda kernel: kernel.occupancy)
        note = f"{len(own)} kernels; the fewest in {worst.name}, {worst.registers} registers"
        if problems:
            note += f"; {len(problems)} beyond their limits, such as {problems[0][:160]}"
        wrong = sum(bool(kernel.problem()) for kernel in own)
        record.add("build", f"kernels beyond their limits, {target}", wrong, "", aim=0, note=note)


def target_architectures(context: Context) -> str:
    """What is compiled for: the default, and this card if the default leaves it out."""
    if context.on_gpu and "LOWRANK_CUDA_ARCHS" not in os.environ:
        major, minor = torch.cuda.get_device_capability()
        own = f"{major}{minor}"
        targets = native.architectures()
        if not any(re.fullmatch(rf"{own}[af]?", target) for target in targets):
            os.environ["LOWRANK_CUDA_ARCHS"] = " ".join([own, *targets])
    return " ".join(native.architectures())


def choose_host_compiler(nvcc: str, candidates: Sequence[str] = _HOST_COMPILERS) -> Json:
    """Finds a host compiler that nvcc takes, and makes it nvcc's by NVCC_PREPEND_FLAGS.

    Returns:
        "chosen": nvcc's default, a program, or None where none works; "refused" says why others
        do not.
    """
    refused: Json = {}
    former = os.environ.get("NVCC_PREPEND_FLAGS", "")
    found = [path for name in candidates if (path := shutil.which(name))]
    choices = [("default", "")]
    choices += [(path, f"-ccbin {path}") for path in found]
    choices += [("default, although unsupported", "-allow-unsupported-compiler")]
    for name, flags in choices:
        problem = _tries(nvcc, f"{former} {flags}".strip())
        if problem is None:
            if flags:
                os.environ["NVCC_PREPEND_FLAGS"] = f"{former} {flags}".strip()
            return {"chosen": name, "refused": refused}
        refused[name] = problem
    return {"chosen": None, "refused": refused}


def _tries(nvcc: str, flags: str) -> str | None:
    """What nvcc says against the probe; None for nothing."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cu"
        source.write_text(_PROBE)
        command = [nvcc, "-std=c++20", "-extended-lambda", "-c", str(source), "-o", f"{source}.o"]
        former = os.environ.get("NVCC_PREPEND_FLAGS")
        os.environ["NVCC_PREPEND_FLAGS"] = flags
        try:
            native.run(command)
        except native.BuildError as error:
            return str(error)[-600:]
        finally:
            if former is None:
                del os.environ["NVCC_PREPEND_FLAGS"]
            else:
                os.environ["NVCC_PREPEND_FLAGS"] = former
    return None


@contextlib.contextmanager
def timed(output: list[tuple[str, float]]) -> Iterator[None]:
    """Keeps (file, seconds) of each command; nvcc compiles for several targets at once."""
    original: Callable[..., str] = native.run
    flags = os.environ.get("NVCC_APPEND_FLAGS")

    def kept(command: Sequence[str]) -> str:
        begin = time.monotonic()
        said = original(command)
        if "-c" in command or "-shared" in command:
            name = Path(command[command.index("-c") + 1] if "-c" in command else command[-1]).name
            output.append((name, round(time.monotonic() - begin, 2)))
        return said

    os.environ["NVCC_APPEND_FLAGS"] = f"{flags or ''} --threads=4".strip()
    setattr(native, "run", kept)  # noqa: B010 (a name that mypy takes for constant)
    try:
        yield
    finally:
        setattr(native, "run", original)  # noqa: B010
        if flags is None:
            del os.environ["NVCC_APPEND_FLAGS"]
        else:
            os.environ["NVCC_APPEND_FLAGS"] = flags


def _load(record: Record, name: str, device: torch.device) -> None:
    found = library.status(name)
    good = found.runs_on(device)
    record.facts[f"{name} library"] = found.detail
    record.check(f"the {name} library is compiled and runs", good, found.detail)


def _smoke(record: Record, context: Context) -> None:
    """One call of each kind of operation, with finite results."""
    from . import bandwidth

    kernels = bandwidth.kernels(1 << 15, context.device)
    calls: dict[str, Any] = {}
    for name, kernel in kernels.items():
        try:
            with using_kernels("native"):
                call = kernel.prepare()
                call()
            context.clock.synchronize()
            calls[name] = "ran"
        except Exception as error:
            calls[name] = f"{type(error).__name__}: {error}"[:500]
    broken = {name: said for name, said in calls.items() if said != "ran"}
    detail = "; ".join(f"{name}: {said}" for name, said in broken.items())
    record.check("each operation runs", not broken, detail or f"{len(calls)} operations")
