"""Subspaces are judged by what they capture, against the optimum from fp64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowrank.optimizers.engine import chunks, devices
from lowrank.optimizers.engine.geometry import Side
from lowrank.optimizers.projectors import decompositions, orthonormal, subspace
from lowrank.optimizers.projectors import operand as operand_module
from lowrank.trainers.plan.ledger import Ledger

SHAPES = ((48, 96), (96, 48), (64, 64))
RANK = 16


def spectrum(kind: str, count: int) -> Tensor:
    index = torch.arange(1, count + 1, dtype=torch.float64)
    return {
        "decay_0.5": index**-0.5,
        "decay_0.8": index**-0.8,
        "decay_1.2": index**-1.2,
        "spiked": torch.where(index <= 4, 10.0 / index, 0.05),
        "flat": torch.ones(count, dtype=torch.float64),
        "deficient": torch.where(index <= 6, 1.0 / index, 0.0),
        "conditioned_1e8": torch.logspace(0, -8, count, dtype=torch.float64),
    }[kind]


SPECTRA = ("decay_0.5", "decay_0.8", "decay_1.2", "spiked", "flat", "deficient", "conditioned_1e8")


def with_spectrum(shape: tuple[int, int], values: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    m, n = shape
    left = torch.linalg.qr(torch.randn(m, m, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    count = min(m, n)
    return (left[:, :count] * values) @ right[:, :count].T


def fit(
    grad: Tensor, mode: str, side: Side, former: Tensor | None = None, rank: int = RANK
) -> tuple[Tensor, ...]:
    scale = grad.abs().max().item()
    return decompositions.bases([grad], [scale], rank, side, mode, [former], seed=3)[0]


def energy(grad: Tensor, bases: tuple[Tensor, ...], side: Side) -> float:
    """Captured energy relative to the best possible at this rank, in fp64."""
    g = grad.double()
    low = bases[0].double().T @ g if side is Side.LEFT else g @ bases[-1].double()
    if side is Side.BOTH:
        low = bases[0].double().T @ g @ bases[1].double()
    best = torch.linalg.svdvals(g)[: bases[0].shape[1]].square().sum()
    return (low.square().sum() / best).item()


def defect(basis: Tensor) -> float:
    gram = basis.double().T @ basis.double()
    return (gram - torch.eye(len(gram), dtype=torch.float64)).abs().max().item()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize(
    ("mode", "bar"), [("svd", 1e-6), ("eigh", 1e-6), ("randomized", 1e-3), ("warm", 1e-3)]
)
def test_captured_energy_and_orthonormality(
    shape: tuple[int, int], kind: str, mode: str, bar: float
) -> None:
    grad = with_spectrum(shape, spectrum(kind, min(shape))).float()
    drift = with_spectrum(shape, spectrum(kind, min(shape)), seed=1).float()
    for side in Side:
        # from the basis of a gradient that has drifted a little
        former = fit(grad + 0.2 * drift, "eigh", side)[0] if mode == "warm" else None
        bases = fit(grad, mode, side, former)
        for basis in bases:
            assert defect(basis) < 1e-5, side
        assert 1 - energy(grad, bases, side) < bar, side


@pytest.fixture
def as_on_a_gpu() -> Iterator[None]:
    """CPU tensors take the ways of CUDA tensors: half-precision products, Cholesky QR, batches."""
    with devices.as_on_gpu():
        yield


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize("mode", ["randomized", "warm"])
def test_what_a_gpu_does_captures_as_much(
    shape: tuple[int, int], kind: str, dtype: torch.dtype, rotate: bool, mode: str
) -> None:
    values = spectrum(kind, min(shape))
    grads = [with_spectrum(shape, values, seed=s).to(dtype) for s in range(3)]
    scales = [grad.abs().max().item() for grad in grads]
    drifted = [g.float() + 0.2 * with_spectrum(shape, values, seed=9).float() for g in grads]
    former = [fit(g, "eigh", Side.LEFT)[0] if mode == "warm" else None for g in drifted]
    together = decompositions.bases(
        grads, scales, RANK, Side.LEFT, mode, former, seed=3, rotate=rotate
    )
    for i, (grad, bases) in enumerate(zip(grads, together, strict=True)):
        assert bases[0].shape == (shape[0], RANK)
        assert defect(bases[0]) < 1e-5
        # Unrotated, no directions are sampled beyond the rank, and slow decays stay a bit behind;
        # bf16 makes the flat spectrum uneven below what an iteration resolves.
        slow = not rotate or (kind == "flat" and dtype == torch.bfloat16)
        own = energy(grad, bases, Side.LEFT)
        assert 1 - own < (4e-3 if slow else 1e-3)
        (alone,) = decompositions.bases(
            [grad], [scales[i]], RANK, Side.LEFT, mode, [former[i]], seed=3, rotate=rotate
        )
        assert own == pytest.approx(energy(grad, alone, Side.LEFT), abs=2e-4)


def test_a_warm_start_finds_directions_that_it_lacks() -> None:
    grad = with_spectrum((64, 128), spectrum("decay_0.8", 64)).float()
    (whole,) = fit(grad, "svd", Side.LEFT, rank=24)
    lacking = torch.cat((whole[:, :3], whole[:, 8:21]), 1)  # not the 4th to the 8th
    found = fit(grad, "warm", Side.LEFT, former=lacking)
    assert 1 - energy(grad, found, Side.LEFT) < 1e-3


@pytest.mark.parametrize("shape", [(200, 40), (64, 64), (30, 1)], ids=str)
@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6])
def test_cholesky_is_orthonormal(shape: tuple[int, int], condition: float) -> None:
    d, k = shape
    values = torch.logspace(0, -math.log10(condition), k, dtype=torch.float64)
    batch = torch.stack([with_spectrum(shape, values, seed=s).float() for s in range(3)])
    made, fine = orthonormal.shifted_cholesky(batch)
    assert fine.tolist() == [True] * 3
    for one, matrix in zip(made, batch, strict=True):
        assert defect(one) < 2e-6
        # The first j vectors span the first j columns, and point their way.
        upper = one.double().T @ matrix.double()
        assert upper.tril(-1).abs().max() < 1e-5 * matrix.abs().max() * d
        assert (upper.diagonal() > 0).all()


def test_cholesky_reports_what_it_cannot_do() -> None:
    good = torch.randn(50, 6)
    deficient, dead, broken = good.clone(), good.clone(), good.clone()
    deficient[:, 3] = deficient[:, 1]
    dead[:, 2] = 0.0
    broken[4, 1] = float("nan")
    batch = torch.stack([good, deficient, dead, broken])
    _, fine = orthonormal.shifted_cholesky(batch)
    assert fine.tolist() == [True, False, False, False]
    made = subspace.cholesky_or_householder([good, deficient])
    assert max(map(defect, made)) < 1e-5


@pytest.mark.parametrize("mode", ["randomized", "warm"])
def test_products_that_overflow_are_reported(mode: str) -> None:
    grad = torch.full((24, 40), 1e30)
    operand = operand_module.Operand(grad, 1.0, Side.LEFT)  # without rescaling
    attempts = {
        "warm": lambda: subspace.warm([operand], 4, [torch.eye(24)[:, :4]], seed=1),
        "randomized": lambda: subspace.randomized([operand], 4, seed=1),
    }
    with pytest.raises(subspace.NotConverged):
        attempts[mode]()


@pytest.mark.parametrize("mode", ["svd", "eigh", "randomized"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_precisions(mode: str, dtype: torch.dtype) -> None:
    grad = with_spectrum((48, 96), spectrum("decay_0.8", 48)).to(dtype)
    (basis,) = fit(grad, mode, Side.LEFT)
    assert basis.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert defect(basis) < 1e-5
    assert 1 - energy(grad, (basis,), Side.LEFT) < (1e-3 if mode == "randomized" else 1e-6)


@pytest.mark.parametrize("mode", ["eigh", "randomized"])
@pytest.mark.parametrize("scale", [1e-25, 1e25], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_extreme_scales_are_rescaled(mode: str, scale: float, shape: tuple[int, int]) -> None:
    grad = with_spectrum(shape, spectrum("decay_0.8", min(shape)))
    bases = fit((grad * scale).float(), mode, Side.LEFT)
    assert 1 - energy(grad, bases, Side.LEFT) < 1e-3


@pytest.mark.parametrize("chunk", [64, 1 << 22])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pieces_do_not_matter(
    chunk: int, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Upcasting a bf16 gradient in pieces equals upcasting it whole."""
    grad = with_spectrum(shape, spectrum("decay_0.5", min(shape))).bfloat16()
    monkeypatch.setattr(chunks, "PRODUCT_ELEMENTS", chunk)
    operand = operand_module.Operand(grad, 1.0, Side.LEFT)
    whole = grad.float() if operand.wide else grad.float().T
    right = torch.randn(operand.long, 5)
    left = torch.randn(operand.short, 5)
    torch.testing.assert_close(operand.times(right), whole @ right)
    torch.testing.assert_close(operand.transposed_times(left), whole.T @ left)
    torch.testing.assert_close(operand.gram(), whole @ whole.T)


@pytest.mark.parametrize("mode", ["eigh", "randomized"])
@pytest.mark.parametrize("side", list(Side), ids=lambda side: side.name)
def test_batched_equals_single(mode: str, side: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    grads = [with_spectrum((24, 40), spectrum("decay_0.8", 24), seed=s).float() for s in range(5)]
    scales = [grad.abs().max().item() for grad in grads]
    monkeypatch.setattr(decompositions, "SCRATCH_BYTES", 2 * 24 * 24 * 4)
    together = decompositions.bases(grads, scales, 6, side, mode, [None] * 5, seed=3)
    for grad, bases in zip(grads, together, strict=True):
        for a, b in zip(bases, fit(grad, mode, side, rank=6), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["eigh", "randomized", "warm"])
@pytest.mark.parametrize("m", [16, 24, 48, 130])
def test_equal_entries_give_finite_bases(mode: str, m: int) -> None:
    """Their Gram matrices are of rank 1, for which LAPACK's fp32 solver may give NaN silently."""
    grad = torch.ones(m, 16)
    former = torch.linalg.qr(matrix_of(16, 4)).Q
    for side in (Side.LEFT, Side.RIGHT):
        (basis,) = fit(grad, mode, side, former, rank=4)
        assert basis.isfinite().all()
        torch.testing.assert_close(basis.T @ basis, torch.eye(4), atol=1e-5, rtol=0)
        assert energy(grad, (basis,), side) > 1 - 1e-6


def test_vectors_take_the_place_of_a_gram_matrix() -> None:
    gram = torch.stack([matrix_of(12, 20) @ matrix_of(12, 20).T, torch.eye(12)])
    wanted = torch.linalg.eigh(gram)
    own = gram.clone()
    values, vectors = subspace.eigh(own, gram.clone)
    assert vectors.data_ptr() == own.data_ptr()
    assert torch.equal(values, wanted.eigenvalues)
    assert torch.equal(vectors, wanted.eigenvectors)
    assert torch.equal(subspace.eigh(gram)[1], vectors)
    (basis,) = fit(matrix_of(48, 96), "eigh", Side.LEFT)
    assert basis.untyped_storage().nbytes() == 48 * RANK * 4


def test_a_gram_matrix_that_a_solver_has_spoiled_is_made_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gram = matrix_of(12, 20) @ matrix_of(12, 20).T
    solve = torch.linalg.eigh

    def fails(matrix: Tensor, **keywords: Any) -> Any:
        if matrix.dtype == torch.float64:
            return solve(matrix, **keywords)
        return keywords["out"][0], keywords["out"][1].fill_(math.nan)

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    _, vectors = subspace.eigh(gram.clone(), gram.clone)
    torch.testing.assert_close(vectors.abs(), solve(gram)[1].abs(), rtol=0, atol=1e-4)


def matrix_of(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def test_randomized_depends_on_its_seed_alone() -> None:
    grad = with_spectrum((24, 40), spectrum("flat", 24)).float()
    torch.manual_seed(1)
    (first,) = fit(grad, "randomized", Side.LEFT)
    torch.manual_seed(2)
    (second,) = fit(grad, "randomized", Side.LEFT)
    assert torch.equal(first, second)
    scale = [grad.abs().max().item()]
    other = decompositions.bases([grad], scale, RANK, Side.LEFT, "randomized", [None], seed=4)
    assert not torch.equal(first, other[0][0])


def test_full_pairs_belong_together() -> None:
    """left^T G right is diagonal and positive, as singular vectors make it."""
    grad = with_spectrum((24, 40), spectrum("decay_0.5", 24)).float()
    for mode in ("svd", "eigh"):
        left, right = fit(grad, mode, Side.BOTH, rank=5)
        core = left.T @ grad @ right
        torch.testing.assert_close(core, core.diagonal().diag(), rtol=0, atol=1e-5)
        assert (core.diagonal() > 0).all()


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    rank=st.integers(1, 40),
    mode=st.sampled_from(["svd", "eigh", "randomized"]),
    side=st.sampled_from(list(Side)),
    seed=st.integers(0, 1000),
)
def test_any_shape(m: int, n: int, rank: int, mode: str, side: Side, seed: int) -> None:
    rank = min(rank, m, n)
    grad = torch.randn(m, n, generator=torch.Generator().manual_seed(seed))
    bases = fit(grad, mode, side, rank=rank)
    for basis in bases:
        assert basis.shape[1] == rank
        assert defect(basis) < 1e-4
    assert energy(grad, bases, side) > 0.9


def test_a_refit_frees_images_and_sketches_that_nobody_will_read() -> None:
    """A long gradient's image, l x k, is the largest thing there; there is one at a time."""
    rank, grad = 8, torch.randn(20, 4000)
    operands = [operand_module.Operand(grad, 1.0, Side.LEFT)]
    image = 4000 * 20 * 4  # 16 directions more, of at most 20
    ledger = Ledger()
    ledger.hold([grad], "given")
    with devices.as_on_gpu(), ledger:
        subspace.randomized(operands, rank, 1)
    assert ledger.peak.parts["other"] < 1.5 * image
