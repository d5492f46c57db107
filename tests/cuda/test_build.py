"""Compiling: what is made, what is said when it can't be, and what nvcc reports."""

import platform
import shutil
import sys
from pathlib import Path

import pytest
from compiling import UNOPTIMISED, caching_compiler, made_before

from lowrank.cuda import build, status
from lowrank.cuda.library import Library

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent

needs_compiler = pytest.mark.skipif(build.find_compiler() is None, reason="no C++ compiler")


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOWRANK_CUDA", "LOWRANK_CUDA_ARCHS"):
        monkeypatch.delenv(name, raising=False)


@needs_compiler
@pytest.mark.slow
def test_without_cuda_the_host_library_is_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For every CPU capability; what is compiled was compiled when it was installed."""
    compiler, installed = build.find_compiler(), status("host").library
    assert compiler is not None
    monkeypatch.setenv("LOWRANK_CUDA", "0")
    stand_in = (
        caching_compiler(compiler, UNOPTIMISED)
        if installed is None
        else made_before(compiler, installed.path)
    )
    monkeypatch.setenv("CXX", stand_in)
    report = build.build(tmp_path)
    assert report["host"]["built"]
    assert report["cuda"] == {"built": False, "reason": "LOWRANK_CUDA=0 when it was installed"}
    assert build.files(report)[0] == "liblowrank_host.so"
    if platform.machine() == "x86_64":
        assert build.files(report) == [name for name, _ in build.HOSTS.values()]
    for name in build.files(report):
        Library(tmp_path / name, "cpu")
    made = (tmp_path / build.files(report)[0]).stat().st_mtime_ns
    assert build.build(tmp_path) == report
    assert (tmp_path / build.files(report)[0]).stat().st_mtime_ns == made
    (tmp_path / build.files(report)[0]).unlink()
    build.build(tmp_path)
    assert (tmp_path / build.files(report)[0]).exists()


def test_a_folder_that_can_not_be_written_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").touch()
    assert build.main([str(tmp_path / "taken")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert "taken" in said


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    monkeypatch.setattr(build, "find_compiler", lambda: None)
    report = build.build(tmp_path)
    assert "no C++ compiler was found" in report["host"]["reason"]
    assert "no nvcc was found" in report["cuda"]["reason"]
    monkeypatch.setenv("LOWRANK_CUDA", "1")
    with pytest.raises(build.BuildError, match="no nvcc was found"):
        build.build(tmp_path)


def test_a_failing_compiler_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho it does not work >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("CUDACXX", str(tmp_path / "absent"))
    report = build.build(tmp_path / "lib")
    assert report["host"]["reason"] == "broken failed:\nit does not work"
    assert "absent: No such file" in report["cuda"]["reason"]
    assert [path.name for path in (tmp_path / "lib").iterdir()] == ["build.json"]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("LOWRANK_CUDA", "yes", "LOWRANK_CUDA is 'yes': accepted are 0, 1 and auto"),
        ("LOWRANK_CUDA_ARCHS", "sm_80", "LOWRANK_CUDA_ARCHS is 'sm_80'"),
    ],
)
def test_bad_settings(name: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    read = {
        "LOWRANK_CUDA": lambda: build.build(ROOT / "nowhere"),
        "LOWRANK_CUDA_ARCHS": build.architectures,
    }
    with pytest.raises(build.BuildError, match=message):
        read[name]()
    assert not (ROOT / "nowhere").exists()


def test_architecture_flags() -> None:
    flags = " ".join(build.architecture_flags(["80", "90a"]))
    assert "code=sm_80" in flags
    assert "code=sm_90a" in flags
    assert "arch=compute_80,code=compute_80" in flags


@pytest.mark.skipif(status("cuda").library is None, reason="the device's library is not compiled")
def test_without_a_device_a_call_says_so() -> None:
    library = status("cuda").library
    assert library is not None
    if library.devices:
        pytest.skip("there is a device")
    count, problem = library.count_devices()
    assert count == 0
    assert "(error" in problem
    assert problem in status("cuda").detail
    assert library.capability(0) == 0
    code = library._functions["rademacher"](None, 0, 1000, 1, None)
    assert code != 0
    message = library._loaded.lowrank_error(code).decode()
    assert "driver" in message or "device" in message


FORMATTER = shutil.which("clang-format", path=str(Path(sys.executable).parent))


@pytest.mark.skipif(FORMATTER is None, reason="the extra `test` is not installed")
def test_native_sources_are_formatted() -> None:
    assert FORMATTER is not None
    own = sorted([*HERE.glob("*.h"), *HERE.glob("*.cpp")])
    paths = [*map(str, build.source_files()), *map(str, own)]
    build.run([FORMATTER, "--dry-run", "--Werror", *paths])
