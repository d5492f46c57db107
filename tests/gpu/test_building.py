"""gpu-check: building, and the script around it, with stand-ins for nvcc and Pythons."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stand_ins import on_gpu, part
from support import ROOT

from lowrank.cuda import build as native
from lowrank.cuda import occupancy

SCRIPT = ROOT / "scripts/gpu-check"
needs_nvcc = pytest.mark.skipif(native.find_nvcc() is None, reason="there is no nvcc")


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def record(file: Path) -> Any:
    return part("record").Record("some", file, {})


# The build


@needs_nvcc
@pytest.mark.slow
def test_a_real_compilation_is_timed_and_tells_its_registers(tmp_path: Path) -> None:
    nvcc = native.find_nvcc()
    assert nvcc is not None
    output: list[Any] = []
    original, source = native.run, native.SOURCES / "device" / "noise.cu"
    with part("build").timed(output):
        flags = [*native.DEVICE_FLAGS, *native.architecture_flags(["90a"])]
        said = native.compile_library(nvcc, flags, [source], tmp_path / "lib.so")
    assert native.run is original
    assert [name for name, _ in output] == ["noise.cu", "lib.so"]
    found = occupancy.read(said)
    assert found
    assert {kernel.target for kernel in found} == {"sm_90a"}


@pytest.fixture
def nvcc_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the build sets is gone afterwards."""
    for name in ("NVCC_PREPEND_FLAGS", "LOWRANK_CUDA_ARCHS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.usefixtures("nvcc_flags")
@pytest.mark.parametrize(
    ("accepts", "chosen", "flags"),
    [
        ("*", "default", None),
        ("*-ccbin*g++-12*", "g++-12", "-ccbin {folder}/g++-12"),
        ("*-allow-unsupported-compiler*", "default, although", "-allow-unsupported-compiler"),
        ("never", None, None),
    ],
)
def test_a_host_compiler_that_nvcc_takes_is_found(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    accepts: str,
    chosen: str | None,
    flags: str | None,
) -> None:
    nvcc = program(
        tmp_path / "nvcc",
        f'case "$NVCC_PREPEND_FLAGS" in {accepts}) exit 0;; esac\n'
        'echo "#error -- unsupported GNU version! gcc" >&2; exit 1',
    )
    for name in ("g++-13", "g++-12"):
        program(tmp_path / name, "exit 0")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    found = part("build").choose_host_compiler(str(nvcc), ("g++-13", "g++-12", "g++-none"))
    assert (found["chosen"] is None) == (chosen is None)
    assert (chosen or "") in (found["chosen"] or "")
    expected = flags and flags.format(folder=tmp_path)
    assert os.environ.get("NVCC_PREPEND_FLAGS") == expected
    if chosen != "default":
        assert "unsupported GNU version" in found["refused"]["default"]


@pytest.mark.usefixtures("nvcc_flags")
@pytest.mark.parametrize(
    ("capability", "expected"), [((9, 0), "80 90a"), ((8, 0), "80 90a"), ((7, 5), "75 80 90a")]
)
def test_an_unusual_card_is_compiled_for(
    gpu: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    expected: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert part("build").target_architectures(on_gpu()) == expected


@pytest.mark.usefixtures("nvcc_flags")
def test_a_library_that_is_not_there_is_a_failed_check_and_stops_nothing(
    gpu: SimpleNamespace, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, library = record(file), part("build").library
    missing = library.Status("cuda", None, "nvcc failed:\nno such thing")
    monkeypatch.setattr(part("build"), "compile_libraries", lambda *given: None)
    monkeypatch.setattr(library, "status", lambda name: missing)
    part("build").run(found, on_gpu())
    assert [check["passed"] for check in found.checks[:2]] == [False, False]
    assert "nvcc failed" in found.checks[0]["detail"]
    kernels = record(file.with_name("kernels.json"))
    monkeypatch.setattr(part("kernels"), "status", lambda name: missing)
    monkeypatch.setattr(
        part("kernels"),
        "importlib",
        SimpleNamespace(import_module=lambda name: SimpleNamespace(CASES=())),
    )
    monkeypatch.setattr(
        part("bandwidth"), "run", lambda *given: kernels.add("bytes", "one", 1.0, "")
    )
    part("kernels").run(kernels, on_gpu())
    (check,) = kernels.checks
    assert not check["passed"]
    assert "plain torch is measured" in check["detail"]
    assert kernels.value("bytes", "one") == 1.0


# The script


def script(*arguments: str, root: Path = ROOT, **environment: str) -> Any:
    return subprocess.run(
        [str(root / "scripts/gpu-check"), *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so_in_a_line(tmp_path: Path) -> None:
    done = script("--output", str(tmp_path / "out"), PYTHON=sys.executable)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"gpu-check: torch {torch.__version__}")
    assert "--device cpu tries the script" in line
    assert list((tmp_path / "out").iterdir()) == []


def test_without_torch_it_names_what_it_tried(tmp_path: Path) -> None:
    bare = program(tmp_path / "python", "exit 1")
    done = script("--device", "cpu", PYTHON=str(bare))
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"gpu-check: no Python from 3.11 on with PyTorch among: {bare}; PYTHON=... names one"
    ]


@pytest.mark.parametrize(
    ("arguments", "chosen"),
    [((), "of the path"), (("--device", "cpu"), "of .venv"), (("--device=cpu",), "of .venv")],
)
def test_a_python_with_cuda_is_preferred(
    tmp_path: Path, arguments: tuple[str, ...], chosen: str
) -> None:
    def python(path: Path, kind: str, which: str) -> None:
        program(path, f'if [ "$1" = -c ]; then echo {kind}; else echo "{which}: $*"; fi')

    root = tmp_path / "a copy"
    (root / "scripts").mkdir(parents=True)
    shutil.copy(SCRIPT, root / "scripts")
    python(root / ".venv/bin/python", "cpu", "of .venv")
    python(tmp_path / "bin/python3", "cuda", "of the path")
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    done = script(*arguments, root=root, PATH=path, PYTHON="", TMPDIR=str(tmp_path))
    assert done.stdout.startswith(f"{chosen}: -m gpu_check --root {root} --links {tmp_path}")


def test_the_probe_tells_builds_apart_without_importing(tmp_path: Path) -> None:
    text = SCRIPT.read_text()
    probe = text[text.index("probe='") + len("probe='") :].partition("'\n")[0]
    for line, kind in (
        ("cuda: Optional[str] = '13.0'", "cuda"),
        ("cuda: Optional[str] = None", "cpu"),
        ("cuda = '12.8'", "cuda"),
    ):
        package = tmp_path / kind / "torch"
        package.mkdir(parents=True, exist_ok=True)
        (package / "__init__.py").write_text("raise RuntimeError('imported')")
        (package / "version.py").write_text(f"debug = False\n{line}\n")
        found = subprocess.run(
            [sys.executable, "-S", "-c", probe],
            env=os.environ | {"PYTHONPATH": str(package.parent)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert found.stdout.strip() == kind


#: Each section by itself is a slow test of test_sections.py.
@pytest.mark.exhaustive
def test_all_sections_run_on_a_cpu(tmp_path: Path) -> None:
    done = script(
        *("--device", "cpu", "--size", "tiny", "--output", str(tmp_path / "out")),
        PYTHON=sys.executable,
        TMPDIR=str(tmp_path),
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    names = ("rates", "build", "kernels", "steps", "launches", "refresh", "memory")
    for name in names:
        found = json.loads((tmp_path / "out" / f"gpu-check-cpu-{name}.json").read_text())
        assert (found["state"], found["errors"], found["skipped"]) == ("complete", [], [])
    summary = json.loads((tmp_path / "out" / "gpu-check-cpu-summary.json").read_text())
    assert list(summary["sections"]) == list(names)
    assert summary["command"].startswith("./scripts/gpu-check --device cpu --size tiny")
    assert summary["failures"] == []
    assert "correctness holds" in done.stdout.splitlines()[-1]
    assert list(tmp_path.glob("gpu-check.*")) == []  # the links are gone
