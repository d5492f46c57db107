"""See `./scripts/gpu-check`."""

from __future__ import annotations

import argparse
import functools
import subprocess
import sys
import time
from pathlib import Path

import torch

from lowrank.cuda import build, library

from . import bandwidth, refresh, steps
from .clock import Clock
from .record import Record
from .workload import MODELS, TOYS, Model

TESTS = ("tests/cuda/test_device.py", "tests/optimizers/test_device_optimizers.py")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="gpu-check", description=__doc__)
    parser.add_argument("--root", type=Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=Path("gpu-check"), help="folder")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--minutes", type=float, default=8.0, help="time for all of it")
    return parser.parse_args()


def compile_libraries(record: Record, root: Path, on_gpu: bool) -> None:
    """Builds in place.

    Raises:
        RuntimeError: a library that is needed could not be built or loaded.
    """
    begin = time.monotonic()
    report = build.build(root / "cuda" / "_lib")
    record.facts["build"] = report
    record.add("build", "compiled", time.monotonic() - begin, "s")
    for name in ("host", "cuda") if on_gpu else ("host",):
        library.status.cache_clear()
        found = library.status(name)
        if found.library is None:
            raise RuntimeError(f"the {name} library: {found.detail}")
    made = library.status("cuda").library
    if on_gpu and (made is None or not made.devices):
        raise RuntimeError("the cuda library sees no device")


def run_tests(record: Record, root: Path, seconds: float) -> None:
    """The CUDA half of the tests: every kernel beside its reference, optimizers beside pure torch.

    Raises:
        RuntimeError: a test failed.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider", *TESTS]
    begin = time.monotonic()
    done = subprocess.run(
        command,
        cwd=root,
        capture_output=True,
        text=True,
        timeout=max(seconds, 10),
        check=False,
    )
    print(done.stdout[-6000:], flush=True)
    record.facts["tests"] = done.stdout.strip().splitlines()[-1:]
    record.add("tests", "pytest -m cuda", time.monotonic() - begin, "s")
    if done.returncode:
        raise RuntimeError(f"pytest ended with {done.returncode}:\n{done.stdout[-3000:]}")


def main() -> int:
    """Runs all sections; 0 if none failed."""
    options = arguments()
    on_gpu = options.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        sys.stderr.write("gpu-check: torch sees no CUDA device; --device cpu tries the script\n")
        return 2
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    clock = Clock(device, 60 * options.minutes)
    record = Record()
    models = MODELS if on_gpu else TOYS
    record.attempt("build", lambda: compile_libraries(record, options.root, on_gpu))
    if "build" not in record.failures:
        if on_gpu:
            record.attempt("tests", lambda: run_tests(record, options.root, 150))
        measure(record, clock, models, on_gpu)
    path = record.save(options.output)
    print(record.table(), flush=True)
    print(f"\n{path}", flush=True)
    return 1 if record.failures else 0


def measure(record: Record, clock: Clock, models: dict[str, Model], on_gpu: bool) -> None:
    """Bandwidth, steps and refreshes, the most telling ones first."""
    rates = {"bytes": 1e9, "flops": 1e9}

    def bytes_rate() -> None:
        rates["bytes"] = bandwidth.run(record, clock, 1 << (27 if on_gpu else 14))

    def flops_rate() -> None:
        rates["flops"] = steps.gemm_rate(clock, 8192 if on_gpu else 64)
        record.add("bandwidth", "bf16 GEMM", rates["flops"] / 1e9, "TFLOP/s")

    record.attempt("bandwidth", bytes_rate)
    record.attempt("GEMM", flops_rate)
    for name, model in models.items():
        partial = functools.partial(steps.run, record, clock, name, model)
        record.attempt(
            f"step {name}",
            lambda work=partial: work(rates["bytes"], rates["flops"]),  # type: ignore[misc]
        )
    for name, model in models.items():
        work = functools.partial(refresh.run, record, clock, name, model, baselines=True)
        record.attempt(f"refresh {name}", work)


if __name__ == "__main__":
    sys.exit(main())
