"""Compiles the native libraries; needs a C++20 compiler, and nvcc for the device's.

Torch-free on purpose: `pip install .` works with build isolation, and one binary serves every
release of torch. Both libraries have the C interface of `core/api.h`.

    python cuda/build.py FOLDER     compiles into FOLDER and prints what was made

Environment: `LOWRANK_CUDA` is `auto` (the device's library if nvcc is found; a failure is
only reported), `1` (a failure is an error) or `0` (not built). `LOWRANK_CUDA_ARCHS`
lists the targets (default `80 90a`; PTX for the first one is added, which newer cards compile).
`CXX` and `CUDACXX` name the compilers.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

if sys.platform != "win32":
    import fcntl

SOURCES = Path(__file__).resolve().parent
DEVICE = "liblowrank_cuda.so"
#: The host's library for each CPU capability, named as in `torch.backends.cpu`. Only the first is
#: required.
HOSTS = {
    "DEFAULT": ("liblowrank_host.so", ()),
    "AVX2": ("liblowrank_host_avx2.so", ("-march=x86-64-v3",)),
    "AVX512": ("liblowrank_host_avx512.so", ("-march=x86-64-v4",)),
}
REPORT = "build.json"
#: What the compilers said: warnings, and the registers of each kernel.
SAID = "compilers.txt"
DEFAULT_ARCHS = "80 90a"

# Contraction into fused multiply-adds is off on both sides, and quotients, roots and subnormal
# numbers are those of IEEE 754, so that they agree to the bit.
HOST_FLAGS = (
    *("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-pthread", "-Wall", "-Wextra"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
)
DEVICE_FLAGS = (
    *("-std=c++20", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra"),
    *("-fmad=false", "-prec-div=true", "-prec-sqrt=true", "-ftz=false", "-Xptxas", "-v"),
)


class BuildError(RuntimeError):
    """A requested library could not be compiled."""


def source_files() -> list[Path]:
    """All source files, sorted."""
    patterns = ("core/*.h", "host/*.h", "host/*.cpp", "device/*.h", "device/*.cu")
    return sorted(path for pattern in patterns for path in SOURCES.glob(pattern))


def find_compiler() -> str | None:
    """The C++ compiler: `CXX`, or the first of c++, g++, clang++ on the path."""
    named = os.environ.get("CXX")
    return named or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)


def find_nvcc() -> str | None:
    """`CUDACXX`, nvcc of `CUDA_HOME` or `CUDA_PATH`, on the path, or in /usr/local/cuda."""
    named = os.environ.get("CUDACXX")
    if named:
        return named
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    folders = [str(Path(home) / "bin") for home in homes if home]
    found = (shutil.which("nvcc", path=folder) for folder in folders)
    return (
        next(filter(None, found), None)
        or shutil.which("nvcc")
        or shutil.which("nvcc", path="/usr/local/cuda/bin")
    )


def architectures() -> list[str]:
    """The targets, such as ["80", "90a"].

    Raises:
        BuildError: `LOWRANK_CUDA_ARCHS` is not a list of such.
    """
    wanted = os.environ.get("LOWRANK_CUDA_ARCHS", DEFAULT_ARCHS).replace(";", " ").split()
    wrong = [arch for arch in wanted if not re.fullmatch(r"\d{2,3}[af]?", arch)]
    if wrong or not wanted:
        raise BuildError(
            f"LOWRANK_CUDA_ARCHS is {' '.join(wanted)!r}: accepted are targets such as '80 90a 100'"
        )
    return wanted


def architecture_flags(archs: Sequence[str]) -> list[str]:
    """nvcc's flags: code for each target, and PTX of the first."""
    pairs = [(f"compute_{arch}", f"sm_{arch}") for arch in archs]
    pairs.append((pairs[0][0], pairs[0][0]))
    return [flag for virtual, code in pairs for flag in ("-gencode", f"arch={virtual},code={code}")]


def run(command: Sequence[str]) -> str:
    """Runs a command and returns its output.

    Raises:
        BuildError: it failed, with its output.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"{command[0]}: {error.strerror}") from None
    if done.returncode:
        message = (done.stderr or done.stdout).strip()
        raise BuildError(f"{Path(command[0]).name} failed:\n{message[-4000:]}")
    return done.stdout + done.stderr


def compile_objects(
    compiler: str, flags: Sequence[str], sources: Sequence[Path], folder: Path
) -> dict[str, str]:
    """Compiles each source into a folder, several at a time.

    Args:
        compiler: program.
        flags: of the compilation.
        sources: with different names.
        folder: of the objects.

    Returns:
        What the compiler said, by object.

    Raises:
        BuildError: the compiler failed.
    """
    objects = [str(folder / f"{source.stem}.o") for source in sources]

    def one(source: Path, output: str) -> str:
        return run([compiler, *flags, "-c", str(source), "-o", output])

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        return dict(zip(objects, pool.map(one, sources, objects), strict=True))


def compile_library(
    compiler: str,
    flags: Sequence[str],
    sources: Sequence[Path],
    target: Path,
    link: Sequence[str] | None = None,
) -> str:
    """Compiles sources and links them; writes `target` atomically.

    Args:
        compiler: program.
        flags: of the compilation.
        sources: with different names.
        target: the shared library.
        link: flags of the linking, those of the compilation by default.

    Returns:
        What the compiler said.

    Raises:
        BuildError: the compiler failed.
    """
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        said = compile_objects(compiler, flags, sources, Path(folder))
        made = str(Path(folder) / target.name)
        run([compiler, *(flags if link is None else link), "-shared", *said, "-o", made])
        os.replace(made, target)
    return "".join(said.values())


def build_host(folder: Path) -> dict[str, Any]:
    """Compiles the host's libraries.

    Raises:
        BuildError: there is no compiler, or it failed.
    """
    compiler = find_compiler()
    if compiler is None:
        raise BuildError("no C++ compiler was found (c++, g++, clang++, or CXX)")
    sources = sorted((SOURCES / "host").glob("*.cpp"))
    files = []
    for level, (name, flags) in HOSTS.items():
        if flags and platform.machine().lower() not in ("x86_64", "amd64"):
            continue
        try:
            said = compile_library(compiler, [*HOST_FLAGS, *flags], sources, folder / name)
        except BuildError:  # optional: the compiler doesn't support this CPU capability
            if level == "DEFAULT":
                raise
        else:
            files.append(name)
            remember(folder, said)
    return {"compiler": run([compiler, "--version"]).splitlines()[0], "files": files}


def build_device(folder: Path) -> dict[str, Any]:
    """Compiles the device's library.

    Raises:
        BuildError: there is no nvcc, or it failed.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise BuildError("no nvcc was found (CUDACXX, CUDA_HOME, the path, /usr/local/cuda)")
    archs = architectures()
    flags = [*DEVICE_FLAGS, *architecture_flags(archs)]
    sources = sorted((SOURCES / "device").glob("*.cu"))
    said = compile_library(nvcc, [*flags, "-cudart", "static"], sources, folder / DEVICE)
    remember(folder, said)
    version = run([nvcc, "--version"]).strip().splitlines()[-1]
    return {"compiler": version, "architectures": archs, "files": [DEVICE]}


def remember(folder: Path, said: str) -> None:
    """Adds what a compiler said to the folder's file of it."""
    with (folder / SAID).open("a") as file:
        file.write(said)


def digest() -> str:
    """Hash of everything that affects the result of the compilation."""
    names = ("CXX", "CUDACXX", "CUDA_HOME", "CUDA_PATH", "LOWRANK_CUDA", "LOWRANK_CUDA_ARCHS")
    state = hashlib.sha256()
    for name in names:
        state.update(f"{name}={os.environ.get(name)}\n".encode())
    state.update(f"{find_compiler()} {find_nvcc()}\n".encode())
    for path in (Path(__file__), *source_files()):
        data = path.read_bytes()
        state.update(f"{path.name} {len(data)}\n".encode() + data)
    return state.hexdigest()


def build(folder: Path) -> dict[str, Any]:
    """Compiles the libraries into `folder`, unless they are up to date.

    Args:
        folder: created if missing. Its `build.json` reports what was built, or why not.

    Returns:
        That report: for "host" and "cuda" {"built": bool} with "compiler", "files" and (cuda)
        "architectures", or with "reason".

    Raises:
        BuildError: `LOWRANK_CUDA` is not accepted, or is 1 and the device's library failed.
    """
    wanted = os.environ.get("LOWRANK_CUDA", "auto")
    if wanted not in ("0", "1", "auto"):
        raise BuildError(f"LOWRANK_CUDA is {wanted!r}: accepted are 0, 1 and auto")
    folder.mkdir(parents=True, exist_ok=True)
    with alone_in(folder):
        return build_if_changed(folder, wanted)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Waits until no other process compiles into the folder."""
    if sys.platform == "win32":
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def build_if_changed(folder: Path, wanted: str) -> dict[str, Any]:
    """Compiles the libraries, unless those in the folder are of these sources; see `build`."""
    inputs = digest()
    former = read_report(folder)
    if former.get("digest") == inputs and all((folder / name).exists() for name in files(former)):
        return former
    for old in (REPORT, SAID, DEVICE, *(name for name, _ in HOSTS.values())):
        (folder / old).unlink(missing_ok=True)
    report: dict[str, Any] = {"digest": inputs}
    for key, make in (("host", build_host), ("cuda", build_device)):
        try:
            if key == "cuda" and wanted == "0":
                raise BuildError("LOWRANK_CUDA=0 when it was installed")
            report[key] = {"built": True, **make(folder)}
        except BuildError as error:
            if key == "cuda" and wanted == "1":
                raise
            report[key] = {"built": False, "reason": str(error)}
    (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n")
    return report


def files(report: dict[str, Any]) -> list[str]:
    """Names of the libraries in a report."""
    return [name for key in ("host", "cuda") for name in report.get(key, {}).get("files", ())]


def read_report(folder: Path) -> dict[str, Any]:
    """The report that `build` wrote into a folder; empty if there is none."""
    try:
        report = json.loads((folder / REPORT).read_text())
    except (OSError, ValueError):
        return {}
    return report if isinstance(report, dict) else {}


def main(arguments: Sequence[str]) -> int:
    """Compiles into the folder that is the only argument."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        sys.stderr.write("usage: build.py FOLDER\n")
        return 2
    try:
        report = build(Path(arguments[0]))
    except (BuildError, OSError) as error:  # a folder that can't be written, a full disk
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
