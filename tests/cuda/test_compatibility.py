"""Devices that the CUDA library can't run on: one warning each, and plain torch instead."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lowrank.cuda import compatibility, library, rademacher, status, using_kernels

COMPILER = "Build cuda_13.0"
UNUSABLE_IN_DEVICE = 209  # cudaErrorNoKernelImageForDevice
UNSUPPORTED_PTX = 222
OUT_OF_MEMORY = 2
INSUFFICIENT_DRIVER = 35
MESSAGES = {
    UNUSABLE_IN_DEVICE: "no kernel image is available for execution on the device",
    UNSUPPORTED_PTX: "the provided PTX was compiled with an unsupported toolchain.",
    OUT_OF_MEMORY: "out of memory",
    INSUFFICIENT_DRIVER: "CUDA driver version is insufficient for CUDA runtime version",
}


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        ("80 90a", 80, True),
        ("80 90a", 86, True),  # the same major number
        ("80 90a", 75, False),
        ("80 90a", 70, False),
        ("80 90a", 90, True),
        ("80 90a", 120, True),  # PTX of compute_80
        ("90a 80", 90, True),
        ("90a 80", 89, True),
        ("90a 80", 100, False),  # neither PTX of compute_90a nor another major number's code
        ("90 80", 100, True),
        ("90 80", 75, False),
        ("86", 80, False),
        ("100f", 103, True),
        ("100f", 120, False),
        ("100a", 103, False),
        ("", 80, False),
    ],
)
def test_which_devices_there_is_code_for(architectures: str, capability: int, runs: bool) -> None:
    assert compatibility.covers(architectures.split(), capability) is runs


def test_an_unreadable_target() -> None:
    with pytest.raises(ValueError, match="architecture is 'sm_80'"):
        compatibility.covers(["sm_80"], 80)


class Loaded:
    """A library's answers.

    Args:
        capabilities: of each device.
        counting: error with which the driver counts them.
        probing: error of the probe.
    """

    def __init__(self, capabilities: tuple[int, ...], counting: int = 0, probing: int = 0) -> None:
        self.capabilities, self.counting, self.probing = capabilities, counting, probing
        self.probed = 0

    def lowrank_devices(self, count: Any) -> int:
        count._obj.value = len(self.capabilities)
        return self.counting

    def lowrank_capability(self, index: int, found: Any) -> int:
        found._obj.value = self.capabilities[index]
        return 0

    def lowrank_probe(self) -> int:
        self.probed += 1
        return self.probing

    def lowrank_error(self, code: int) -> bytes:
        return MESSAGES[code].encode()


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes a function that installs a CUDA library with given answers."""
    report = {"files": ["liblowrank_cuda.so"], "compiler": COMPILER, "architectures": ["80", "90a"]}
    (tmp_path / "build.json").write_text(json.dumps({"cuda": report}))
    (tmp_path / "liblowrank_cuda.so").touch()
    monkeypatch.setattr(library, "FOLDER", tmp_path)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=None)
    )

    def install(loaded: Loaded) -> Loaded:
        def load(self: library.Library, path: Path, device_type: str) -> None:
            self.path, self.device_type = path, device_type
            self._loaded = loaded  # type: ignore[assignment]

        monkeypatch.setattr(library.Library, "__init__", load)
        return loaded

    for cached in (library.status, library._say_unusable):
        cached.cache_clear()
    with using_kernels("native"):
        yield install
    for cached in (library.status, library._say_unusable):
        cached.cache_clear()


def on(index: int) -> Any:
    """What stands for a tensor on a device."""
    return [SimpleNamespace(device=torch.device("cuda", index))]


@pytest.mark.parametrize(
    ("loaded", "reason", "remedy"),
    [
        (Loaded((75,)), "compute capability 7.5", "LOWRANK_CUDA_ARCHS set to 75"),
        (Loaded((80,), probing=UNUSABLE_IN_DEVICE), "no kernel image", "LOWRANK_CUDA_ARCHS"),
        (Loaded((120,), probing=UNSUPPORTED_PTX), "unsupported toolchain", "driver"),
        (
            Loaded((), counting=INSUFFICIENT_DRIVER, probing=INSUFFICIENT_DRIVER),
            "driver version is insufficient",
            "Update NVIDIA's driver",
        ),
    ],
    ids=["capability", "no image", "ptx", "driver"],
)
def test_it_is_said_once_with_library_device_reason_and_remedy(
    installed: Any, loaded: Loaded, reason: str, remedy: str
) -> None:
    installed(loaded)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert [library.library_for(on(0)) for _ in range(3)] == [None] * 3
    assert [warning.category for warning in caught] == [UserWarning]
    said = str(caught[0].message)
    for part in ("liblowrank_cuda.so", "sm_90a", "cuda:0", reason, remedy, "LOWRANK_KERNELS=torch"):
        assert part in said
    detail = status("cuda").detail  # what `lowrank methods --system` prints
    assert reason in detail
    assert "liblowrank_cuda.so" in detail
    assert loaded.probed <= 1


def test_without_use_the_detail_says_what_the_driver_knows(installed: Any) -> None:
    loaded = installed(Loaded((75, 90)))
    detail = status("cuda").detail
    assert "not used on cuda:0: it has code for sm_80, sm_90a, PTX of compute_80" in detail
    assert "cuda:1" not in detail
    assert loaded.probed == 0
    library.status.cache_clear()
    installed(Loaded(()))
    assert "the driver has no device" in status("cuda").detail


def test_each_device_is_judged_by_itself(installed: Any) -> None:
    loaded = installed(Loaded((75, 90)))
    with pytest.warns(UserWarning, match="cuda:0"):
        assert library.library_for(on(0)) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            found = library.library_for(on(1))
            assert found is not None
            assert found.path.name == "liblowrank_cuda.so"
    assert loaded.probed == 1
    assert library.status("cuda").detail.count("not used") == 1


def test_a_probe_that_may_pass_is_not_held_against_the_device(installed: Any) -> None:
    installed(Loaded((80,), probing=OUT_OF_MEMORY))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert library.library_for(on(0)) is not None


def test_errors_of_calls(installed: Any) -> None:
    installed(Loaded((80,)))
    found = library.library_for(on(0))
    assert found is not None
    device = torch.device("cuda:0")
    found._functions = {"rademacher": lambda *arguments: UNUSABLE_IN_DEVICE}
    with pytest.raises(
        library.UnusableError, match=r"no kernel image.*LOWRANK_CUDA_ARCHS"
    ) as error:
        found.call("rademacher", device)
    assert error.value.device == device
    found._functions = {"rademacher": lambda *arguments: OUT_OF_MEMORY}
    with pytest.raises(RuntimeError, match=r"lowrank_rademacher: out of memory \(error 2\)"):
        found.call("rademacher", device)


@pytest.mark.skipif(status("host").library is None, reason="the host's library is not compiled")
def test_an_operation_that_can_not_start_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def call(self: library.Library, name: str, device: torch.device, *arguments: object) -> None:
        calls.append(name)
        raise library.UnusableError(device, "no kernel image is available. Do something.")

    with using_kernels("native"):
        expected = rademacher((3, 50), 7)
    state = library.Status("host", status("host").library, "of the test")
    monkeypatch.setattr(library, "status", lambda name: state)
    monkeypatch.setattr(library.Library, "call", call)
    library._say_unusable.cache_clear()
    with using_kernels("native"):
        with pytest.warns(UserWarning, match=r"of the test.*on cpu: no kernel image.*something"):
            assert torch.equal(rademacher((3, 50), 7), expected)
        assert torch.equal(rademacher((3, 50), 7), expected)
    assert calls == ["rademacher"]  # it isn't tried again
    assert "not used on cpu" in state.detail
    library._say_unusable.cache_clear()
