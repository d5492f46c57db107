"""Finding and loading the compiled libraries, and choosing between them and pure torch."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from . import compatibility
from .build import DEVICE, HOSTS, read_report

FOLDER = Path(__file__).resolve().parent / "_lib"
ABI = 7
KERNELS = ("native", "torch")

_POINTER, _LONG, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_SEED, _FLOAT, _DOUBLE = ctypes.c_uint64, ctypes.c_float, ctypes.c_double
_UPDATE = [
    _POINTER,
    _INT,
    _POINTER,
    _INT,
    _POINTER,
    *[_LONG] * 4,
]  # direction, grad, factors, shape

#: Argument types of the functions in core/api.h, without the stream that comes last.
SIGNATURES: dict[str, list[type]] = {
    "quantize_blockwise": [_POINTER, _INT, _POINTER, _POINTER, _LONG, _LONG, _POINTER, _INT],
    "dequantize_blockwise": [_POINTER, _POINTER, _POINTER, _INT, _LONG, _LONG, _POINTER],
    "quantize_groups": [
        *[_POINTER, _INT, _POINTER, _POINTER, _POINTER, _INT],
        *[_LONG, _LONG, _INT, _INT, _SEED, _SEED],
    ],
    "dequantize_groups": [_POINTER, _POINTER, _POINTER, _INT, _POINTER, _INT, _LONG, _LONG],
    "dequantize_groups_list": [
        *[_INT, _POINTER, _POINTER, _POINTER, _INT, _POINTER, _POINTER],
        *[_INT, _LONG],
    ],
    "quantize_int4": [
        *[_POINTER, _INT, _POINTER, _POINTER, _POINTER, _INT],
        *[_LONG, _LONG, _INT, _FLOAT, _POINTER],
    ],
    "dequantize_int4": [
        *[_POINTER, _POINTER, _POINTER, _INT, _POINTER, _INT],
        *[_LONG, _LONG, _INT, _POINTER],
    ],
    "dequantize_int4_list": [
        *[_INT, _POINTER, _POINTER, _POINTER, _INT, _POINTER, _POINTER],
        *[_INT, _LONG, _INT, _POINTER],
    ],
    "rademacher": [_POINTER, _INT, _LONG, _SEED],
    "gaussian": [_POINTER, _INT, _LONG, _SEED, _POINTER, _SEED],
    "gaussian_list": [_INT, *[_POINTER] * 4, _INT, _FLOAT],
    "stochastic_bfloat16": [_POINTER, _POINTER, _LONG, _SEED, _SEED, _POINTER],
    "step_seeds": [_INT, _POINTER, _POINTER, _SEED, _POINTER],
    "adam": [_INT, *[_POINTER] * 8, *[_INT] * 4, _DOUBLE, _DOUBLE, _FLOAT, _FLOAT, _POINTER],
    "adam_8bit": [
        *[_INT, *[_POINTER] * 7, _INT, _INT, _DOUBLE, _DOUBLE, _FLOAT, _FLOAT],
        *[_POINTER, _POINTER, _POINTER],
    ],
    "adam_weights": [
        *[_INT, *[_POINTER] * 5, _INT, _INT, _DOUBLE, _DOUBLE],
        *[*[_FLOAT] * 4, _POINTER],
    ],
    "cautious_rows": [
        *[_POINTER, _INT, *[_POINTER] * 5, _LONG, _LONG, _INT, _INT, *[_FLOAT] * 4],
        *[_SEED, _SEED, _LONG],
    ],
    "limit_growth": [_INT, *[_POINTER] * 4, _FLOAT],
    "write_back": [
        *[_POINTER, _INT, *_UPDATE, _FLOAT, _FLOAT],
        *[_INT, _SEED, _SEED, _POINTER, _POINTER],
    ],
    "write_back_list": [_INT, *[_POINTER] * 3, _INT, *[_LONG] * 4, _FLOAT],
    "write_back_int8": [
        *[_POINTER, _POINTER, _POINTER, _INT, *_UPDATE],
        *[_LONG, _FLOAT, _FLOAT, _SEED, _SEED, _POINTER, _POINTER],
    ],
    "write_back_int4": [
        *[_POINTER, _POINTER, _INT, *_UPDATE],
        *[_LONG, _FLOAT, _FLOAT, _SEED, _SEED, _LONG, _POINTER, _POINTER],
    ],
}


class UnusableError(RuntimeError):
    """A library's kernels can't be started on a device; nothing was computed or written.

    Attributes:
        device: the device.
        reason: the reason, and advice.
    """

    def __init__(self, device: torch.device, reason: str) -> None:
        super().__init__(f"no kernel can be started on {device}: {reason}")
        self.device, self.reason = device, reason


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
        """Number of the driver's devices; 0 for the host's library."""
        return self.count_devices()[0]

    def count_devices(self) -> tuple[int, str]:
        """Number of the driver's devices, and the reason if there is none."""
        count = ctypes.c_int(0)
        code = self._loaded.lowrank_devices(ctypes.byref(count))
        return count.value, self._problem(code)

    def capability(self, index: int) -> int:
        """Ten times the major and the minor number of a device's compute capability."""
        found = ctypes.c_int(0)
        self._loaded.lowrank_capability(index, ctypes.byref(found))
        return found.value

    def probe(self, device: torch.device) -> str:
        """Why no kernel can be started on a device; empty if one can. Launches nothing."""
        with torch.cuda.device(device):
            code = self._loaded.lowrank_probe()
        # Other errors, such as a lack of memory, may be temporary; a failing call reports them.
        return self._problem(code) if code in compatibility.UNUSABLE else ""

    def _problem(self, code: int) -> str:
        if not code:
            return ""
        message = self._loaded.lowrank_error(code).decode()
        return f"{message} (error {code}). {compatibility.advice(code)}".rstrip()

    def call(self, name: str, device: torch.device, *arguments: object) -> None:
        """Calls a function; on a GPU it is put on the current stream.

        Raises:
            UnusableError: no kernel can be started on the device.
            RuntimeError: the launch failed.
        """
        function = self._functions[name]
        if self.device_type == "cpu":
            self._loaded.lowrank_set_threads(torch.get_num_threads())
            code = function(*arguments, None)
        else:
            with torch.cuda.device(device):
                code = function(*arguments, torch.cuda.current_stream(device).cuda_stream)
        if code in compatibility.UNUSABLE and self.device_type == "cuda":
            raise UnusableError(device, self._problem(code))
        if code:
            message = self._loaded.lowrank_error(code).decode()
            raise RuntimeError(f"lowrank_{name}: {message} (error {code})")


@dataclass(frozen=True)
class Status:
    """The status of one library.

    Attributes:
        name: "host" or "cuda".
        library: the loaded library, or None.
        made: how it was compiled, or why there is none.
        problems: by device, why the library isn't used there; an empty string if it is used. Filled
            when the library is loaded, and by the first use of a device.
    """

    name: str
    library: Library | None
    made: str
    problems: dict[str, str] = field(default_factory=dict)

    @property
    def detail(self) -> str:
        """How it was compiled, or why not; and devices on which it can't be used, with reasons."""
        unusable = [f"not used on {on}: {why}" for on, why in self.problems.items() if why]
        return "; ".join([self.made, *unusable])

    def runs_on(self, device: torch.device) -> bool:
        """Whether the library can be used on a device; warns once if not."""
        if self.library is None:
            return False
        if device.type == "cuda" and str(device) not in self.problems:
            self.problems[str(device)] = self.library.probe(device)
        reason = self.problems.get(str(device), "")
        if reason:
            _say_unusable(self.name, self.made, str(device), reason)
        return not reason


@functools.cache
def status(name: str) -> Status:
    """Loads the library "host" or "cuda" once, and returns its status."""
    report = read_report(FOLDER).get(name, {})
    files = [file for file in report.get("files", ()) if (FOLDER / file).exists()]
    if not files:
        reason = report.get("reason", f"{FOLDER} has no library; install the package again")
        return Status(name, None, reason)
    file = DEVICE if name == "cuda" else _best_host(files)
    device_type = "cpu" if name == "host" else "cuda"
    try:
        library = Library(FOLDER / file, device_type)
    except (OSError, ImportError, AttributeError) as error:
        return Status(name, None, f"{file} can't be loaded: {error}")
    archs = report.get("architectures", ())
    made = ", ".join([file, report["compiler"], *filter(None, [compatibility.targets(archs)])])
    problems = _device_problems(library, archs) if name == "cuda" else {}
    return Status(name, library, made, problems)


def _device_problems(library: Library, architectures: Sequence[str]) -> dict[str, str]:
    """Devices without compiled code, as far as known without using them."""
    count, problem = library.count_devices()
    if problem or not count:
        return {"cuda": problem or "the driver has no device"}
    found = {index: library.capability(index) for index in range(count)}
    return {
        f"cuda:{index}": compatibility.no_code(architectures, capability)
        for index, capability in found.items()
        if capability and not compatibility.covers(architectures, capability)
    }


def _best_host(made: Sequence[str]) -> str:
    """The library for the highest capability of this CPU."""
    levels = list(HOSTS)
    level = torch.backends.cpu.get_cpu_capability()
    usable = levels[: levels.index(level) + 1] if level in levels else levels[:1]
    return next(HOSTS[one][0] for one in reversed(usable) if HOSTS[one][0] in made)


class _Choice:
    """The choice of kernels, shared by the process."""

    name = os.environ.get("LOWRANK_KERNELS", "native")
    assumed: type | None = None


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


@contextlib.contextmanager
def assuming_libraries() -> Iterator[None]:
    """Takes libraries to be there for fake tensors, which no compiled code is called for.

    So a machine without a GPU can find out what a machine with one would allocate.
    """
    from torch._subclasses.fake_tensor import FakeTensor

    former = _Choice.assumed
    _Choice.assumed = FakeTensor
    try:
        yield
    finally:
        _Choice.assumed = former


@functools.cache
def _say_missing(name: str) -> None:
    warnings.warn(
        f"lowrank computes in pure torch where it has a faster kernel: the {name} library is not "
        f"there ({status(name).detail.splitlines()[0]}). LOWRANK_KERNELS=torch asks for that "
        "and says nothing.",
        stacklevel=2,
    )


@functools.cache
def _say_unusable(name: str, made: str, device: str, reason: str) -> None:
    warnings.warn(
        f"lowrank computes in pure torch where it has a faster kernel: the {name} library ({made}) "
        f"can't be used on {device}: {reason} LOWRANK_KERNELS=torch asks for pure torch and says "
        "nothing.",
        stacklevel=2,
    )


def give_up(error: UnusableError) -> None:
    """Uses pure torch on a device from now on, and warns."""
    found = status("cuda" if error.device.type == "cuda" else "host")
    found.problems[str(error.device)] = error.reason
    found.runs_on(error.device)


def library_for(tensors: Sequence[Tensor]) -> Library | None:
    """The library that computes on these tensors' device; None for pure torch."""
    if _Choice.name != "native" or not tensors:
        return None
    kind = tensors[0].device.type
    if kind not in ("cpu", "cuda"):
        return None
    name = "host" if kind == "cpu" else "cuda"
    if _Choice.assumed is not None and isinstance(tensors[0], _Choice.assumed):
        return _ASSUMED
    found = status(name)
    if found.library is None:
        _say_missing(name)
        return None
    return found.library if found.runs_on(tensors[0].device) else None


_ASSUMED = object.__new__(Library)
set_kernels(_Choice.name)
