"""See `./scripts/gpu-check`."""

from __future__ import annotations

import argparse
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from . import summary
from .files import Json, read
from .summary import INTERRUPTED
from .supervisor import NO_DEVICE, Job, run

#: Seconds of each section of the six minutes, the most telling section first.
BUDGETS = {
    "build": 70.0,
    "kernels": 65.0,
    "steps": 80.0,
    "launches": 25.0,
    "refresh": 50.0,
    "memory": 45.0,
}
MINUTES = 6.0
#: Seconds that a section has at least, others than half its budget: without the libraries the later
#: ones measure plain torch, so a slow compiler may take of their time.
LEAST = {"build": 150.0}
#: Seconds of those for the rates and for starting processes.
RATES, RESERVE = 20.0, 5.0
#: Exit status where results have no place.
NO_OUTPUT = 2
#: Most seconds of the rates: the first import of torch on a machine reads gigabytes.
COLD = 60.0


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    about = "Builds, compares and times everything on one GPU."
    parser = argparse.ArgumentParser(prog="gpu-check", description=about, allow_abbrev=False)
    parser.add_argument("--root", type=Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--links", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=Path("gpu-check"), help="folder for JSON")
    parser.add_argument(
        "--only", type=sections, default=list(BUDGETS), help=f"some of {','.join(BUDGETS)}"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--size", choices=("full", "small", "tiny"), help="full on cuda, else small"
    )
    parser.add_argument("--minutes", type=_minutes, default=MINUTES, help="for all of it")
    options = parser.parse_args(given)
    options.size = options.size or ("full" if options.device == "cuda" else "small")
    return options


def sections(text: str) -> list[str]:
    """Names of sections in the order in which they run.

    Raises:
        ArgumentTypeError: one is unknown.
    """
    names = {name.strip() for name in text.split(",")}
    unknown = sorted(names - BUDGETS.keys())
    if unknown:
        raise argparse.ArgumentTypeError(
            f"{unknown[0]!r} is no section; accepted are {', '.join(BUDGETS)}"
        )
    return [name for name in BUDGETS if name in names]


def _minutes(text: str) -> float:
    value = float(text)
    if not 0.5 <= value <= 60:
        raise argparse.ArgumentTypeError(f"{text} minutes; accepted are 0.5 to 60")
    return value


def limit(name: str, chosen: list[str], left: float, scale: float) -> float:
    """Seconds for a section: what is left, less what the later ones are to have.

    Args:
        name: of the section that begins.
        chosen: all sections of this run.
        left: seconds of the whole check that are left.
        scale: the whole check's time over the usual one.
    """
    later = sum(BUDGETS[other] for other in chosen[chosen.index(name) + 1 :]) * scale
    least = LEAST.get(name, 0.5 * BUDGETS[name]) * scale
    return max(left - later, min(left, least))


def main() -> int:
    """Runs the sections; returns the exit status."""
    signal.signal(signal.SIGTERM, _interrupt)
    # Also where the other arguments end it.
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--links", type=Path)
    links = own.parse_known_args()[0].links
    try:
        return check(arguments())
    finally:
        if links is not None:
            shutil.rmtree(links, ignore_errors=True)


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def check(options: argparse.Namespace) -> int:
    """Runs the sections and the summary."""
    begin = time.monotonic()
    end = begin + 60 * options.minutes - RESERVE
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=options.output).close()
    except OSError as error:
        why = error.strerror or error
        sys.stderr.write(f"gpu-check: --output {options.output} can't be written into: {why}\n")
        return NO_OUTPUT
    common = ["--root", str(options.root), "--device", options.device, "--size", options.size]
    results: dict[str, Json] = {}
    interrupted = False

    def section(name: str, path: Path, seconds: float, *more: str) -> int:
        print(f"== {name} (at most {seconds:.0f} s)", flush=True)
        module = [sys.executable, "-m", "gpu_check.section", name]
        command = [*module, *common, "--file", str(path), *more]
        status = INTERRUPTED
        try:
            _, status = run(Job(name, path, seconds, command, stalls=name != "build"))
        finally:
            about = {"file": path.name, "limit": round(seconds, 1)}
            results[name] = {"state": "interrupted"} | read(path) | about
        return status

    prefix = "gpu-check"
    try:
        rates = options.output / f"{prefix}-rates.json"
        scale = options.minutes / MINUTES
        if section("rates", rates, COLD * scale) == NO_DEVICE:
            return NO_DEVICE
        prefix = f"{prefix}-{slug(results['rates'].get('facts', {}).get('device', 'unknown'))}"
        rates = rates.replace(options.output / f"{prefix}-rates.json")
        results["rates"]["file"] = rates.name
        for name in options.only:
            path = options.output / f"{prefix}-{name}.json"
            seconds = limit(name, options.only, end - time.monotonic(), scale)
            section(name, path, seconds, "--rates", str(rates))
    except KeyboardInterrupt:
        interrupted = True
    path = options.output / f"{prefix}-summary.json"
    return summary.report(
        path, results, chosen=options.only, seconds=time.monotonic() - begin, cut=interrupted
    )


def slug(name: str) -> str:
    """A device's name as a part of a file's."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-") or "unknown"


if __name__ == "__main__":
    sys.exit(main())
