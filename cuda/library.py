"""The compiled libraries: finding them, loading them, and choosing between them and pure torch."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .build import DEVICE, HOSTS, read_report

FOLDER = Path(__file__).resolve().parent / "_lib"
ABI = 1
KERNELS = ("native", "torch")

_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_SEED, _FLOAT, _DOUBLE = ctypes.c_uint64, ctypes.c_float, ctypes.c_double
_UPDATE = [_POINTER, _INT, _POINTER, _INT, _POINTER, *[_LONG] * 4]  # delta, grad, factors, shape

#: Argument types of the functions in core/api.h, without the stream that comes last.
SIGNATURES: dict[str, list[type]] = {
    "quantize_blockwise": [_POINTER, _INT, _POINTER, _POINTER, _LONG, _LONG, _POINTER, _INT],
    "dequantize_blockwise": [_POINTER, _POINTER, _POINTER, _INT, _LONG, _LONG, _POINTER],
    "quantize_groups": [
        *[_POINTER, _INT, _POINTER, _POINTER, _POINTER, _INT],
        *[_LONG, _LONG, _INT, _INT, _SEED, _SEED],
    ],
    "dequantize_groups": [_POINTER, _POINTER, _POINTER, _INT, _POINTER, _INT, _LONG, _LONG],
    "quantize_int4": [
        *[_POINTER, _INT, _POINTER, _POINTER, _POINTER, _INT],
        *[_LONG, _LONG, _INT, _FLOAT, _POINTER],
    ],
    "dequantize_int4": [
        *[_POINTER, _POINTER, _POINTER, _INT, _POINTER, _INT],
        *[_LONG, _LONG, _INT, _POINTER],
    ],
    "rademacher": [_POINTER, _INT, _LONG, _SEED],
    "stochastic_bfloat16": [_POINTER, _POINTER, _LONG, _SEED, _SEED],
    "adam": [_INT, *[_POINTER] * 8, *[_INT] * 4, _DOUBLE, _DOUBLE, _FLOAT, _FLOAT, _POINTER],
    "adam_8bit": [
        *[_INT, *[_POINTER] * 7, _INT, _INT, _DOUBLE, _DOUBLE, _FLOAT, _FLOAT],
        *[_POINTER, _POINTER, _POINTER],
    ],
    "write_back": [_POINTER, _INT, *_UPDATE, _FLOAT, _FLOAT, _INT, _SEED, _SEED],
    "write_back_int8": [
        *[_POINTER, _POINTER, _POINTER, _INT, *_UPDATE],
        *[_LONG, _FLOAT, _FLOAT, _SEED, _SEED],
    ],
}


class Library:
    """One loaded library.

    Attributes:
        path: the file.
        device_type: "cpu" or "cuda", where its functions compute.
    """

    def __init__(self, path: Path, device_type: str) -> None:
        """Loads the file.

        Raises:
            OSError: it can't be loaded.
            ImportError: it has another interface than this package.
        """
        self.path, self.device_type = path, device_type
        self._loaded = ctypes.CDLL(str(path))
        found = int(self._loaded.lowrank_abi())
        if found != ABI:
            raise ImportError(
                f"{path} has interface {found}, this package needs {ABI}; install it again"
            )
        self._loaded.lowrank_error.restype = ctypes.c_char_p
        self._functions = {}
        for name, types in SIGNATURES.items():
            function = getattr(self._loaded, f"lowrank_{name}")
            function.argtypes = [*types, _POINTER]
            self._functions[name] = function

    @property
    def devices(self) -> int:
        """Devices that it can run on; 0 for the host's."""
        return int(self._loaded.lowrank_devices())

    def call(self, name: str, device: torch.device, *arguments: object) -> None:
        """Calls a function; on a GPU it is put on the current stream.

        Raises:
            RuntimeError: the launch failed.
        """
        function = self._functions[name]
        if self.device_type == "cpu":
            self._loaded.lowrank_set_threads(torch.get_num_threads())
            code = function(*arguments, None)
        else:
            with torch.cuda.device(device):
                code = function(*arguments, torch.cuda.current_stream(device).cuda_stream)
        if code:
            message = self._loaded.lowrank_error(code).decode()
            raise RuntimeError(f"lowrank_{name}: {message} (error {code})")


@dataclass(frozen=True)
class Status:
    """What became of one library.

    Attributes:
        name: "host" or "cuda".
        library: what is loaded, or None.
        detail: how it was compiled, or why there is none.
    """

    name: str
    library: Library | None
    detail: str


@functools.cache
def status(name: str) -> Status:
    """Loads the library "host" or "cuda" once, and says what it is or why there is none."""
    report = read_report(FOLDER).get(name, {})
    made = [file for file in report.get("files", ()) if (FOLDER / file).exists()]
    if not made:
        reason = report.get("reason", f"{FOLDER} has no library; install the package again")
        return Status(name, None, reason)
    file = DEVICE if name == "cuda" else _best_host(made)
    device_type = "cpu" if name == "host" else "cuda"
    try:
        library = Library(FOLDER / file, device_type)
    except (OSError, ImportError, AttributeError) as error:
        return Status(name, None, f"{file} can't be loaded: {error}")
    targets = [f"sm_{arch}" for arch in report.get("architectures", ())]
    detail = ", ".join([file, report["compiler"], *targets])
    return Status(name, library, detail)


def _best_host(made: Sequence[str]) -> str:
    """The library for the highest level of instructions that this CPU has."""
    levels = list(HOSTS)
    level = torch.backends.cpu.get_cpu_capability()
    usable = levels[: levels.index(level) + 1] if level in levels else levels[:1]
    return next(HOSTS[one][0] for one in reversed(usable) if HOSTS[one][0] in made)


class _Choice:
    """Which kernels are used; a namespace, because a switch has to be shared."""

    name = os.environ.get("LOWRANK_KERNELS", "native")


def kernels() -> str:
    """ "native" or "torch": what runs the operations of this package."""
    return _Choice.name


def set_kernels(name: str) -> None:
    """Chooses what runs the operations of this package, for the whole process.

    The environment variable `LOWRANK_KERNELS` sets it at the start.

    Args:
        name: "native", the compiled kernels where there are any, or "torch", pure torch.

    Raises:
        ValueError: it is neither.
    """
    if name not in KERNELS:
        raise ValueError(f"kernels are {name!r}; accepted are {', '.join(map(repr, KERNELS))}")
    _Choice.name = name


@contextlib.contextmanager
def using_kernels(name: str) -> Iterator[None]:
    """`set_kernels` for the body of a with statement."""
    former = kernels()
    set_kernels(name)
    try:
        yield
    finally:
        _Choice.name = former


@functools.cache
def _say_missing(name: str) -> None:
    warnings.warn(
        f"lowrank computes in pure torch where it has a faster kernel: the {name} library is not "
        f"there ({status(name).detail.splitlines()[0]}). LOWRANK_KERNELS=torch asks for that "
        "and says nothing.",
        stacklevel=2,
    )


def library_for(tensors: Sequence[Tensor]) -> Library | None:
    """The library that computes on these tensors' device; None for pure torch."""
    if _Choice.name != "native" or not tensors:
        return None
    kind = tensors[0].device.type
    if kind not in ("cpu", "cuda"):
        return None
    name = "host" if kind == "cpu" else "cuda"
    library = status(name).library
    if library is None:
        _say_missing(name)
    return library


set_kernels(_Choice.name)
