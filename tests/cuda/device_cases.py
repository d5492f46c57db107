"""What only a GPU does: launches, streams, graphs, half-precision products and Cholesky QR.

Plain functions of a device, for pytest and for `./scripts/gpu-check`. Those that a CPU can follow
run on it in the ordinary tests, at smaller sizes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from lowrank.cuda import fill_gaussian, gaussian, rademacher, status, using_kernels
from lowrank.optimizers.engine.geometry import Side
from lowrank.optimizers.projectors import decompositions, orthonormal
from lowrank.optimizers.projectors.operand import half_product


@dataclass(frozen=True)
class Case:
    """Something that must hold.

    Attributes:
        name: of it.
        holds: raises unless it does.
        cuda: needs a GPU.
    """

    name: str
    holds: Callable[[torch.device], None]
    cuda: bool = False


def the_library_sees_the_device(device: torch.device) -> None:
    found = status("cuda")
    assert found.library is not None, found.detail
    assert found.library.devices >= 1
    assert found.runs_on(device), found.detail


def signs_are_those_of_the_cpu(device: torch.device) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        ours = rademacher((517, 33), 12345678901234567, dtype, device).cpu()
        assert torch.equal(ours, rademacher((517, 33), 12345678901234567, dtype))


def normal_numbers_are_those_of_the_cpu(device: torch.device) -> None:
    for kernels in ("native", "torch"):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            expected = gaussian((3001, 517), 123, dtype, first=5)
            with using_kernels(kernels):
                made = gaussian((3001, 517), 123, dtype, device, first=5)
            assert torch.equal(made.cpu(), expected), (kernels, dtype)
            filled = [torch.empty(3001, 517, dtype=dtype, device=device) for _ in range(20)]
            with using_kernels(kernels):
                fill_gaussian(filled, [123, *range(19)])
            own = gaussian((3001, 517), 18, dtype)
            assert torch.equal(filled[-1].cpu(), own), (kernels, dtype)


def captured_normal_numbers_follow_the_seed(device: torch.device) -> None:
    seed = torch.tensor(1, device=device)
    for kernels in ("native", "torch"):
        with using_kernels(kernels):
            gaussian((1000,), seed)  # warms up
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                made = gaussian((1000,), seed)
            for number in (7, 8):
                seed.fill_(number)
                graph.replay()
                assert torch.equal(made.cpu(), gaussian((1000,), number)), kernels


def results_do_not_depend_on_the_launch(device: torch.device) -> None:
    """A tensor of many blocks equals its pieces."""
    x = torch.randn(1 << (22 if device.type == "cuda" else 18), device=device)
    whole = torch.empty_like(x, dtype=torch.bfloat16)
    parts = torch.empty_like(whole)
    torch.ops.lowrank.stochastic_bfloat16(x, whole, 7, 0)
    for start in range(0, len(x), 100_003):
        piece = slice(start, start + 100_003)
        torch.ops.lowrank.stochastic_bfloat16(x[piece].clone(), parts[piece], 7, start)
    assert torch.equal(whole, parts)


def kernels_run_on_the_current_stream_and_in_graphs(device: torch.device) -> None:
    out = torch.zeros(1 << 20, dtype=torch.bfloat16, device=device)
    x = torch.randn(1 << 20, device=device)
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


def half_products_are_summed_in_fp32(device: torch.device) -> None:
    left = torch.randn(65, 3000, device=device).bfloat16()
    right = torch.randn(3000, 40, device=device)
    exact = left.double() @ right.bfloat16().double()
    torch.testing.assert_close(half_product(left, right).double(), exact, rtol=1e-4, atol=1e-3)


def cholesky_equals_householder_and_reports_deficient_ranks(device: torch.device) -> None:
    good = torch.randn(3, 700, 100, device=device)
    good[2, :, 7] = good[2, :, 3]
    made, fine = orthonormal.shifted_cholesky(good)
    assert fine.tolist() == [True, True, False]
    theirs = orthonormal.householder(good[0])
    overlap = torch.linalg.svdvals(theirs.double().mT @ made[0].double())
    assert float((overlap - 1).abs().max()) < 1e-5


def bases_capture_the_optimum(
    device: torch.device, *, dtype: torch.dtype, wide: float, mode: str, rotate: bool
) -> None:
    """Two gradients of very different size, with a spectrum like real ones.

    Args:
        device: where.
        dtype: of the gradients.
        wide: n over m.
        mode: of the decomposition.
        rotate: to singular vectors.
    """
    size, rank = (512, 128) if device.type == "cuda" else (64, 16)
    m, n = (size, int(size * wide)) if wide >= 1 else (int(size / wide), size)
    left = torch.linalg.qr(torch.randn(m, size, device=device))[0]
    right = torch.linalg.qr(torch.randn(n, size, device=device))[0]
    values = torch.arange(1, size + 1, device=device) ** -0.8
    grads = [(left * values @ right.mT * scale).to(dtype) for scale in (1.0, 1e-3)]
    side = Side.LEFT if m <= n else Side.RIGHT
    scales = [grad.abs().max().item() for grad in grads]
    arguments = (grads, scales, rank, side)
    former = [pair[0] for pair in decompositions.bases(*arguments, "eigh", [None, None], 0)]
    made = decompositions.bases(*arguments, mode, former, 3, rotate=rotate or mode == "eigh")
    for grad, (basis,) in zip(grads, made, strict=True):
        g, p = grad.double(), basis.double()
        low = p.mT @ g if side is Side.LEFT else g @ p
        best = torch.linalg.svdvals(g)[:rank].square().sum()
        assert float(low.square().sum() / best) > (0.999 if rotate else 0.996)
        eye = torch.eye(rank, dtype=torch.float64, device=device)
        assert float((p.mT @ p - eye).abs().max()) < 1e-5


def _bases() -> list[Case]:
    kinds = itertools.product(
        (torch.float32, torch.bfloat16),
        (2.6875, 1 / 2.6875, 1.0),
        ("eigh", "randomized", "warm"),
        (True, False),
    )
    return [
        Case(
            f"bases capture the optimum: {mode}, {str(dtype)[6:]}, n / m = {wide:.2f}"
            + (", rotated" if rotate else ""),
            partial(bases_capture_the_optimum, dtype=dtype, wide=wide, mode=mode, rotate=rotate),
        )
        for dtype, wide, mode, rotate in kinds
        if rotate or mode != "eigh"
    ]


CASES = (
    Case("the library sees the device", the_library_sees_the_device, cuda=True),
    Case("signs are those of the CPU", signs_are_those_of_the_cpu),
    Case("normal numbers are those of the CPU", normal_numbers_are_those_of_the_cpu),
    Case(
        "captured normal numbers follow the seed",
        captured_normal_numbers_follow_the_seed,
        cuda=True,
    ),
    Case("results do not depend on the launch", results_do_not_depend_on_the_launch),
    Case(
        "kernels run on the current stream and in graphs",
        kernels_run_on_the_current_stream_and_in_graphs,
        cuda=True,
    ),
    Case("half products are summed in fp32", half_products_are_summed_in_fp32),
    Case(
        "Cholesky equals Householder and reports deficient ranks",
        cholesky_equals_householder_and_reports_deficient_ranks,
    ),
    *_bases(),
)
