"""The kernels on a GPU: beside their references, and the ways that only a GPU takes.

Runs in `./scripts/gpu-check`. Inputs are drawn anew in each run.
"""

from collections.abc import Callable
from typing import Any

import exact_cases
import kernel_cases as cases
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowrank.cuda import gaussian, ops, rademacher, status, using_kernels
from lowrank.optimizers.engine.geometry import Side
from lowrank.optimizers.projectors import decompositions, orthonormal
from lowrank.optimizers.projectors.operand import half_product

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.mark.parametrize(
    "case",
    [*cases.CASES, *exact_cases.CASES],
    ids=lambda case: f"{case.__module__}-{case.__name__}",
)
def test_equals_the_reference(case: Callable[[cases.Draw], None]) -> None:
    @settings(
        max_examples=40,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    @given(data=st.data())
    def run(data: st.DataObject) -> None:
        case(cases.Draw(data.draw, torch.device("cuda")))

    with using_kernels("native"):
        run()


def test_the_library_sees_the_device() -> None:
    library = status("cuda").library
    assert library is not None, status("cuda").detail
    assert library.devices >= 1
    assert status("cuda").runs_on(torch.device("cuda", 0)), status("cuda").detail


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_signs_are_those_of_the_cpu(dtype: torch.dtype) -> None:
    ours = rademacher((517, 33), 12345678901234567, dtype, "cuda").cpu()
    assert torch.equal(ours, rademacher((517, 33), 12345678901234567, dtype))


@pytest.mark.parametrize("kernels", ["native", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_normal_numbers_are_those_of_the_cpu(dtype: torch.dtype, kernels: str) -> None:
    expected = gaussian((3001, 517), 123, dtype, first=5)
    with using_kernels(kernels):
        assert torch.equal(gaussian((3001, 517), 123, dtype, "cuda", first=5).cpu(), expected)


@pytest.mark.parametrize("kernels", ["native", "torch"])
def test_captured_normal_numbers_follow_the_seed(kernels: str) -> None:
    seed = torch.tensor(1, device="cuda")
    with using_kernels(kernels):
        gaussian((1000,), seed)  # warms up
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            made = gaussian((1000,), seed)
        for number in (7, 8):
            seed.fill_(number)
            graph.replay()
            assert torch.equal(made.cpu(), gaussian((1000,), number))


@pytest.mark.parametrize("case", cases.EXACT, ids=lambda case: case.__name__)
def test_plain_torch_has_the_bits_of_the_cpu(
    case: Callable[[cases.Draw], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """References on both devices, from the same inputs."""

    def run(
        d: cases.Draw, name: str, arguments: list[Any], written: list[int], keeps: bool = False
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        here = [t.cpu() if isinstance(t, torch.Tensor) else t for t in arguments]
        there = [t.cuda() if isinstance(t, torch.Tensor) else t for t in here]
        here = [t.clone() if isinstance(t, torch.Tensor) else t for t in here]
        reference = ops.OPERATIONS[name][1]
        reference(*here)
        reference(*there)
        return [(there[at].cpu(), here[at]) for at in written if here[at] is not None]

    monkeypatch.setattr(cases, "run", run)

    @settings(
        max_examples=40,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    @given(data=st.data())
    def compare(data: st.DataObject) -> None:
        case(cases.Draw(data.draw, torch.device("cuda")))

    compare()


def test_results_do_not_depend_on_the_launch() -> None:
    """A tensor of many blocks equals its pieces."""
    x = torch.randn(1 << 22, device="cuda")
    whole = torch.empty_like(x, dtype=torch.bfloat16)
    parts = torch.empty_like(whole)
    torch.ops.lowrank.stochastic_bfloat16(x, whole, 7, 0)
    for start in range(0, len(x), 100_003):
        piece = slice(start, start + 100_003)
        torch.ops.lowrank.stochastic_bfloat16(x[piece].clone(), parts[piece], 7, start)
    assert torch.equal(whole, parts)


def test_kernels_run_on_the_current_stream_and_in_graphs() -> None:
    out = torch.zeros(1 << 20, dtype=torch.bfloat16, device="cuda")
    x = torch.randn(1 << 20, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.ops.lowrank.stochastic_bfloat16(x, out, 7, 0)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.ops.lowrank.stochastic_bfloat16(x, out, 7, 0)
    x.fill_(3.0)
    graph.replay()
    torch.cuda.synchronize()
    assert bool((out == 3.0).all())


def test_half_products_are_summed_in_fp32() -> None:
    left = torch.randn(65, 3000, device="cuda").bfloat16()
    right = torch.randn(3000, 40, device="cuda")
    exact = left.double() @ right.bfloat16().double()
    torch.testing.assert_close(half_product(left, right).double(), exact, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(512, 1376), (1376, 512), (512, 512)], ids=str)
@pytest.mark.parametrize("mode", ["eigh", "randomized", "warm"])
@pytest.mark.parametrize("rotate", [True, False])
def test_bases_capture_the_optimum(
    dtype: torch.dtype, shape: tuple[int, int], mode: str, rotate: bool
) -> None:
    m, n = shape
    short = min(shape)
    left = torch.linalg.qr(torch.randn(m, short, device="cuda"))[0]
    right = torch.linalg.qr(torch.randn(n, short, device="cuda"))[0]
    values = torch.arange(1, short + 1, device="cuda") ** -0.8
    grads = [(left * values @ right.mT * scale).to(dtype) for scale in (1.0, 1e-3)]
    side = Side.LEFT if m <= n else Side.RIGHT
    scales = [grad.abs().max().item() for grad in grads]
    arguments = (grads, scales, 128, side)
    former = [pair[0] for pair in decompositions.bases(*arguments, "eigh", [None, None], 0)]
    made = decompositions.bases(*arguments, mode, former, 3, rotate=rotate or mode == "eigh")
    for grad, (basis,) in zip(grads, made, strict=True):
        g, p = grad.double(), basis.double()
        low = p.mT @ g if side is Side.LEFT else g @ p
        best = torch.linalg.svdvals(g)[:128].square().sum()
        assert float(low.square().sum() / best) > (0.999 if rotate else 0.996)
        eye = torch.eye(128, dtype=torch.float64, device="cuda")
        assert float((p.mT @ p - eye).abs().max()) < 1e-5


def test_cholesky_equals_householder_and_reports_deficient_ranks() -> None:
    good = torch.randn(3, 700, 100, device="cuda")
    good[2, :, 7] = good[2, :, 3]
    made, fine = orthonormal.shifted_cholesky(good)
    assert fine.tolist() == [True, True, False]
    theirs = orthonormal.householder(good[0])
    overlap = torch.linalg.svdvals(theirs.double().mT @ made[0].double())
    assert float((overlap - 1).abs().max()) < 1e-5
