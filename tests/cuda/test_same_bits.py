"""What is said to be equal to the bit everywhere: kernels of all kinds, and plain torch on GPUs."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import kernel_cases as cases
import pytest
import torch
from as_on_cuda import AsOnCuda
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowrank.cuda import blockwise, build, gaussian, groups, library, ops, using_kernels


@pytest.mark.slow
@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("case", cases.EXACT, ids=lambda case: case.__name__)
def test_references_on_a_gpu_equal_the_kernels(case: Callable[[cases.Draw], None]) -> None:
    for signed in (True, False):  # tables that are made on the CPU, whatever the device
        blockwise._lookup_table(signed, torch.device("cpu"))

    @settings(
        max_examples=4,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    @given(data=st.data())
    def run(data: st.DataObject) -> None:
        case(cases.Draw(data.draw, torch.device("cpu"), AsOnCuda))

    run()


def test_the_mode_finds_what_differs() -> None:
    x = torch.rand(1000)
    with AsOnCuda():
        there = x / 255
        with pytest.raises(AssertionError, match=r"aten.lerp.*need not have the same bits"):
            torch.lerp(x, x + 1, 0.3)
        with pytest.raises(AssertionError, match=r"aten.add.*need not have the same bits"):
            torch.add(x, x, alpha=0.3)
    assert not torch.equal(there, x / 255)
    assert torch.equal(there, x * (1 / 255))


@pytest.mark.parametrize("levels", [15, 255])
@pytest.mark.parametrize("kernels", ["native", "torch"])
def test_scales_are_products_with_a_reciprocal(levels: int, kernels: str) -> None:
    """They lie within one unit in the last place of the quotient."""
    x = torch.randn(512 * 256)
    with using_kernels(kernels):
        _, scales, _ = groups.quantize_groups(x, levels, 256)
    rows = x.view(-1, 256)
    spread = rows.amax(1) - rows.amin(1)
    assert torch.equal(scales, spread * torch.tensor(1.0).div(levels))
    steps = (scales.view(torch.int32) - (spread / levels).view(torch.int32)).abs()
    assert int(steps.max()) == 1


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-39, 1.2e-38])
@pytest.mark.parametrize("name", ["quantize_blockwise", "midrise", "nf4"])
def test_scales_without_a_finite_reciprocal(name: str, size: float) -> None:
    """Their entries stay as good as zero, on all sides."""
    x = torch.tensor([size, -size, 0.5 * size] * 100)
    found = []
    for compiled in (True, False):
        codes = torch.full((300,), 7, dtype=torch.uint8)
        scales = torch.full((2,), torch.nan)
        if name == "quantize_blockwise":
            arguments: list[Any] = [x, codes, scales, True, 256]
        else:
            arguments = [x, codes[:150], scales, None, name, 256]
        operation = name if name in ops.OPERATIONS else "quantize_int4"
        _, plain, kernel = ops.OPERATIONS[operation]
        (kernel if compiled else plain)(*arguments)
        found.append((codes, scales))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)
    assert found[0][1].isfinite().all()
    if name == "quantize_blockwise" and size < 1.1e-38:
        assert set(found[0][0].tolist()) == {127}  # zero


def test_every_level_of_instructions_gives_the_same_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    levels = list(build.HOSTS)
    level = torch.backends.cpu.get_cpu_capability()
    runnable = levels[: levels.index(level) + 1] if level in levels else levels[:1]
    files = [library.FOLDER / build.HOSTS[one][0] for one in runnable]
    found = [library.Library(file, "cpu") for file in files if file.exists()]
    if not found:
        pytest.skip("the host's library is not compiled")
    with using_kernels("torch"):
        expected = gaussian((50_001,), 99, first=7)
    for one in found:
        state = library.Status("host", one, "of the test")
        monkeypatch.setattr(library, "status", lambda name, state=state: state)
        with using_kernels("native"):
            assert torch.equal(gaussian((50_001,), 99, first=7), expected), one.path


def test_nothing_is_contracted_or_approximated() -> None:
    host, device = " ".join(build.HOST_FLAGS), " ".join(build.DEVICE_FLAGS)
    assert "-ffp-contract=off" in host
    for flag in ("-fmad=false", "-prec-div=true", "-prec-sqrt=true", "-ftz=false"):
        assert flag in device
    assert not re.search(r"fast-?_?math", host.replace("-fno", "") + device)
