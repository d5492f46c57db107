"""The process of one section; started by `supervisor`."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib
import signal
import sys
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .clock import Clock
from .files import Json, read
from .record import NO_TIME, DeviceLost, Record
from .supervisor import DEVICE_LOST, NO_DEVICE
from .workload import SIZES, Size

#: The module of each section.
MODULES = {
    name: name for name in ("rates", "build", "kernels", "steps", "launches", "refresh", "memory")
}


@dataclass(frozen=True)
class Rates:
    """What the device itself can do.

    Attributes:
        copy: bytes a millisecond of a large copy, read and written.
        bf16: floating-point operations a millisecond of a bf16 matrix product.
        fp32: of an fp32 one.
        tf32: of one in TF32, which GPUs have.
        fp64: of an fp64 one.
        launch: milliseconds of a small operation, host included.
    """

    copy: float
    bf16: float
    fp32: float
    tf32: float | None = None
    fp64: float | None = None
    launch: float | None = None


@dataclass(frozen=True)
class Context:
    """What a section works with.

    Attributes:
        root: of the repository.
        clock: of the device.
        size: how much is measured.
        rates: of the device; None where they could not be measured.
    """

    root: Path
    clock: Clock
    size: Size
    rates: Rates | None

    @property
    def device(self) -> torch.device:
        """Where things are computed."""
        return self.clock.device

    @property
    def on_gpu(self) -> bool:
        """Whether that is a GPU."""
        return self.device.type == "cuda"

    def aim(self, value: float | None) -> float | None:
        """The aim on a GPU; on a CPU sizes are too small to say anything."""
        return value if self.on_gpu else None


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="gpu_check.section", allow_abbrev=False)
    parser.add_argument("section", choices=MODULES)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--file", type=Path, required=True)
    parser.add_argument("--rates", type=Path)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--resume", action="store_true")
    return parser.parse_args(given)


def read_rates(path: Path | None) -> Rates | None:
    """The rates of the section that measured them."""
    facts = read(path).get("facts", {}) if path is not None else {}
    rates = facts.get("rates", {})
    known: Json = {name: rates.get(name) or None for name in Rates.__dataclass_fields__}
    needed = (known["copy"], known["bf16"], known["fp32"])
    return Rates(**known) if all(needed) else None


def main(given: list[str] | None = None) -> int:
    """Runs a section; its file says what came of it."""
    options = arguments(given)
    # Each profile has one cycle.
    warnings.filterwarnings("ignore", message=".*Profiler clears events")
    _die_with_parent()
    on_gpu = options.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        sys.stderr.write(f"gpu-check: {no_device()}\n")
        return NO_DEVICE
    record = Record(options.section, options.file, {}, resume=options.resume)
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    if not on_gpu:
        torch.set_num_threads(1)  # sizes are small: threads would only wait for each other
    try:
        clock = Clock(device, options.seconds)
        context = Context(options.root, clock, SIZES[options.size], read_rates(options.rates))
        torch.manual_seed(0)
        gc.collect()
        gc.freeze()  # what is imported stays; collecting after each measurement is quick then
        run(options.section, record, context)
    except KeyboardInterrupt:
        record.state = "interrupted"
    except DeviceLost as error:
        record.state = "device lost"
        record.facts["device_lost"] = str(error)[:2000]
    except torch.OutOfMemoryError as error:
        record.state = "broken"
        record.error(options.section, f"out of memory: {str(error).splitlines()[0]}")
    else:
        cut = any(entry["why"] == NO_TIME for entry in record.skipped)
        record.state = "out of time" if cut else "complete"
    record.save()
    ends = {"interrupted": 130, "device lost": DEVICE_LOST}
    return ends.get(record.state, 0)


def run(section: str, record: Record, context: Context) -> None:
    """Runs a section's module; what escapes its own care is recorded."""
    try:
        check_origin(context.root)
        module: Any = importlib.import_module(f"gpu_check.{MODULES[section]}")
        module.run(record, context)
    except (DeviceLost, torch.OutOfMemoryError):
        raise
    except Exception as error:
        record.error(section, f"{type(error).__name__}: {error}", traceback.format_exc())


def check_origin(root: Path) -> None:
    """Raises where another checkout or an installation would be measured.

    Raises:
        RuntimeError: `lowrank` lies elsewhere.
    """
    for name in ("optimizers", "cuda"):
        file = importlib.import_module(f"lowrank.{name}").__file__
        if file is None or Path(file).resolve().parent != root.resolve() / name:
            raise RuntimeError(f"lowrank.{name} is {file}, not that of {root}")


def no_device() -> str:
    """Why torch has no CUDA device, in a line."""
    kind = f"torch {torch.__version__} of {sys.executable}"
    if torch.version.cuda is None:
        return (
            f"{kind} is built without CUDA; PYTHON=... names another, --device cpu tries the script"
        )
    return f"{kind} sees no CUDA device; --device cpu tries the script"


def _die_with_parent() -> None:
    """A section must not go on with the card when nobody waits for it any more."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


if __name__ == "__main__":
    sys.exit(main())
