"""Native libraries for the tests: the host's, and the device's kernels in a simulator.

The host's is the one that was installed, where it is of these sources. With
`LOWRANK_TEST_SANITIZE=1` both are compiled with AddressSanitizer and UBSan.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from compiling import caching_compiler

from lowrank.cuda import build, library
from lowrank.cuda.library import Library

SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g1", "-O0")
HERE = Path(__file__).resolve().parent
#: Of a CUDA source as host code.
SIMULATED = (
    *("-DLOWRANK_SIMULATOR", f"-I{HERE}", "-fno-strict-aliasing", "-Wno-unknown-pragmas"),
    *("-x", "c++"),
)


def compiler() -> str:
    """The C++ compiler, which compiles a source once in a session."""
    found = build.find_compiler()
    assert found is not None
    return caching_compiler(found)


def compile_host(target: Path, *flags: str) -> None:
    """The host's library with further flags."""
    sources = sorted((build.SOURCES / "host").glob("*.cpp"))
    build.compile_library(compiler(), [*build.HOST_FLAGS, *flags], sources, target)


def compile_simulated(target: Path, *flags: str) -> None:
    """The device's kernels as host code."""
    kernels = sorted((build.SOURCES / "device").glob("*.cu"))
    sources = [path for path in kernels if path.stem != "library"]
    sources.append(build.SOURCES / "host/library.cpp")
    options = [*build.HOST_FLAGS, "-O0", *flags]
    build.compile_library(compiler(), [*options, *SIMULATED], sources, target, link=options)


def is_current() -> bool:
    """Whether the installed libraries are of these sources."""
    report = build.read_report(library.FOLDER)
    return report.get("digest") == build.digest() and report["host"]["built"]


@pytest.fixture(scope="session")
def native_libraries(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Library]:
    """Compiles "host" and "simulated" when they are first asked for."""
    if build.find_compiler() is None:
        pytest.skip("there is no C++ compiler")
    folder = tmp_path_factory.mktemp("native")
    flags = SANITIZE if os.environ.get("LOWRANK_TEST_SANITIZE") == "1" else ()
    made: dict[str, Library] = {}

    def get(name: str) -> Library:
        if name not in made:
            target = folder / f"lib{name}.so"
            if name == "host" and not flags and is_current():
                target = library.FOLDER / build.HOSTS["DEFAULT"][0]
            else:
                (compile_host if name == "host" else compile_simulated)(target, *flags)
            made[name] = Library(target, "cpu")
        return made[name]

    return get


@pytest.fixture(params=["host", pytest.param("simulated", marks=pytest.mark.slow)])
def native(
    request: pytest.FixtureRequest,
    native_libraries: Callable[[str], Library],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[str]:
    """Makes operations on CPU tensors run on one of the libraries; gives its name."""
    chosen = native_libraries(request.param)
    state = library.Status("host", chosen, "of the tests")
    monkeypatch.setattr(library, "status", lambda name: state)
    with library.using_kernels("native"):
        yield request.param
