"""The kernels on a GPU: beside their references, and the ways that only a GPU takes.

`./scripts/gpu-check` runs the same cases without pytest. Inputs are drawn anew in each run.
"""

from collections.abc import Callable

import device_cases
import exact_cases
import kernel_cases as cases
import kernel_runs as runs
import pytest
import torch
from draws import Draw, SeededDraw
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowrank.cuda import ops, using_kernels

on_gpu = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
DEVICES = ["cpu", pytest.param("cuda", marks=on_gpu)]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize(
    "case",
    [*cases.CASES, *exact_cases.CASES],
    ids=lambda case: f"{case.__module__}-{case.__name__}",
)
def test_equals_the_reference(case: Callable[[Draw], None]) -> None:
    @settings(
        max_examples=40,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    @given(data=st.data())
    def run(data: st.DataObject) -> None:
        case(Draw(data.draw, torch.device("cuda")))

    with using_kernels("native"):
        run()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("case", cases.EXACT, ids=lambda case: case.__name__)
def test_plain_torch_has_the_bits_of_the_cpu(case: Callable[[Draw], None]) -> None:
    """References on both devices, from the same inputs."""
    for seed in range(40):
        d = SeededDraw(seed, torch.device("cuda"))
        d.reference, d.plain = torch.device("cpu"), True
        case(d)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", device_cases.CASES, ids=lambda case: case.name)
def test_holds(case: device_cases.Case, device: str) -> None:
    if case.cuda and device == "cpu":
        pytest.skip("a CPU has nothing like it")
    case.holds(torch.device(device))


def choices(seed: int) -> list[object]:
    d = SeededDraw(seed, torch.device("cpu"))
    return [d.integer(1, 9000), d.one("a", "b", "c"), d.seed(), *d.tensor(5).tolist()]


def test_seeded_choices_repeat_and_reach_the_ends() -> None:
    assert choices(3) == choices(3)
    assert len({str(choices(seed)) for seed in range(20)}) == 20
    drawn = [SeededDraw(seed, torch.device("cpu")).integer(1, 9) for seed in range(200)]
    assert drawn.count(1) > 20 < drawn.count(9)
    assert set(drawn) == set(range(1, 10))


def test_a_reference_may_compute_on_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[torch.device] = []

    def kernel(x: torch.Tensor, out: torch.Tensor) -> bool:
        out.copy_(x + 1)
        return True

    def plain(x: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(x + 2)

    def noted(value: object, device: torch.device) -> object:
        moved.append(device)
        return original(value, device)

    original = runs._moved
    monkeypatch.setattr(runs, "_moved", noted)
    monkeypatch.setitem(ops.OPERATIONS, "made_up", ("", plain, kernel))
    d = SeededDraw(0, torch.device("cpu"))
    for reference in (None, torch.device("cpu")):
        d.reference = reference
        with pytest.raises(AssertionError, match="not equal"):
            runs.exactly(runs.run(d, "made_up", [torch.zeros(7), torch.empty(7)], [1]))
    assert moved == [torch.device("cpu")] * 2
    d.plain = True
    runs.exactly(runs.run(d, "made_up", [torch.zeros(7), torch.empty(7)], [1]))
