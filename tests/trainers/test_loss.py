from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank.trainers import loss as losses
from lowrank.trainers.loss import IGNORED, by_rows, chunk_tokens, chunked_cross_entropy
from lowrank.trainers.plan.ledger import Ledger


def reference(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = (hidden @ weight.T).flatten(0, -2)
    return functional.cross_entropy(logits, targets.flatten(), reduction="sum")


@settings(deadline=None, max_examples=40)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 9),
    width=st.integers(1, 6),
    vocabulary=st.integers(1, 11),
    chunk=st.integers(1, 30),
    seed=st.integers(0, 1000),
)
def test_equals_the_whole_computation(
    batch: int, length: int, width: int, vocabulary: int, chunk: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, length, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocabulary, (batch, length), generator=generator)
    targets[torch.rand(batch, length, generator=generator) < 0.3] = IGNORED
    results = []
    for function in (reference, lambda h, w, t: chunked_cross_entropy(h, w, t, chunk)):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = function(h, w, targets)
        (2.5 * loss).backward()
        results.append((loss.detach(), h.grad, w.grad))
    for ours, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_gradcheck() -> None:
    hidden = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 6, IGNORED, 3, 3])
    assert torch.autograd.gradcheck(
        lambda h, w: chunked_cross_entropy(h, w, targets, 2), (hidden, weight)
    )


def test_second_derivative_is_refused_instead_of_wrong() -> None:
    hidden = torch.randn(2, 3, requires_grad=True)
    weight = torch.randn(4, 3, requires_grad=True)
    loss = chunked_cross_entropy(hidden, weight, torch.tensor([1, 2]))
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        gradient.sum().backward()


def test_backward_twice_gives_the_same_gradient() -> None:
    hidden = torch.randn(4, 3, requires_grad=True)
    weight = torch.randn(5, 3, requires_grad=True)
    loss = chunked_cross_entropy(hidden, weight, torch.tensor([1, 2, 0, 4]))
    first = torch.autograd.grad(3 * loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(3 * loss, (hidden, weight))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_bfloat16_is_as_near_as_its_digits_allow() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(256, 32, generator=generator).bfloat16()
    weight = (0.1 * torch.randn(50, 32, generator=generator)).bfloat16()
    targets = torch.randint(50, (256,), generator=generator)
    exact_h, exact_w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    reference(exact_h, exact_w, targets).backward()
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = chunked_cross_entropy(h, w, targets, 16)
    assert loss.dtype == torch.float32
    loss.backward()
    for ours, exact in ((h.grad, exact_h.grad), (w.grad, exact_w.grad)):
        assert ours is not None
        assert exact is not None
        assert ours.dtype == torch.bfloat16
        assert (ours.double() - exact).norm() < 0.01 * exact.norm()


def test_padding_with_infinite_activations_does_not_count() -> None:
    hidden = torch.ones(3, 2)
    hidden[1] = float("inf")
    hidden.requires_grad_()
    weight = torch.ones(4, 2, requires_grad=True)
    loss = chunked_cross_entropy(hidden, weight, torch.tensor([0, IGNORED, 3]))
    assert loss.item() == pytest.approx(2 * torch.tensor(4.0).log().item())


def test_only_ignored_targets_give_zero() -> None:
    hidden = torch.randn(3, 2, requires_grad=True)
    weight = torch.randn(4, 2, requires_grad=True)
    loss = chunked_cross_entropy(hidden, weight, torch.full((3,), IGNORED))
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_without_gradients_nothing_is_kept() -> None:
    hidden = torch.randn(6, 3, requires_grad=True)
    weight = torch.randn(4, 3, requires_grad=True)
    targets = torch.tensor([0, 1, 2, 3, 0, 1])
    with torch.no_grad():
        loss = chunked_cross_entropy(hidden, weight, targets, 4)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, reference(hidden, weight, targets).detach())


def test_chunks_stay_within_their_budget() -> None:
    assert chunk_tokens(32000) * 32000 * 4 <= 64 << 20
    assert chunk_tokens(10**9) == 1


# A large head's gradient by rows of the vocabulary


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every head in half precision is a large one; blocks are of ten rows of the vocabulary."""
    monkeypatch.setattr(losses, "SUM_BYTES", 0)
    monkeypatch.setattr(losses, "chunk_tokens", lambda tokens: 10)


def half_batch(seed: int, tokens: int = 256) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, 32, generator=generator).bfloat16().requires_grad_()
    weight = (0.1 * torch.randn(55, 32, generator=generator)).bfloat16().requires_grad_()
    targets = torch.randint(55, (tokens,), generator=generator)
    targets[torch.rand(tokens, generator=generator) < 0.2] = IGNORED
    return hidden, weight, targets


def errors(seed: int) -> tuple[float, float]:
    """Of the gradients of hidden and weight against float64, relative."""
    hidden, weight, targets = half_batch(seed)
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    wanted = torch.autograd.grad(reference(*exact, targets), exact)
    found = torch.autograd.grad(
        chunked_cross_entropy(hidden, weight, targets, 16), (hidden, weight)
    )
    pairs = zip(found, wanted, strict=True)
    first, second = (float((own.double() - true).norm() / true.norm()) for own, true in pairs)
    return first, second


def test_by_rows_is_no_less_exact_than_by_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    chunked = [errors(seed) for seed in range(4)]
    monkeypatch.setattr(losses, "SUM_BYTES", 0)
    monkeypatch.setattr(losses, "chunk_tokens", lambda tokens: 10)
    by_row = [errors(seed) for seed in range(4)]
    assert [hidden for hidden, _ in by_row] == [hidden for hidden, _ in chunked]
    for (_, own), (_, other) in zip(by_row, chunked, strict=True):
        assert 0 < own < 1.05 * other < 0.01


@pytest.mark.usefixtures("rows")
def test_no_sum_in_float32_is_kept() -> None:
    """Beside the gradients there are logits of a block, and nothing else of the head's size."""
    hidden, weight, targets = half_batch(0, 64)
    ledger = Ledger()
    with ledger:
        loss = chunked_cross_entropy(hidden, weight, targets, 16)
        ledger.restart()
        loss.backward()
    scaled = ledger.peak.total - ledger.now.total
    assert scaled < weight.nbytes  # scaled in place
    assert weight.grad is not None


@pytest.mark.usefixtures("rows")
def test_by_rows_backward_twice_gives_the_same_gradient() -> None:
    hidden, weight, targets = half_batch(0)
    loss = 3 * chunked_cross_entropy(hidden, weight, targets, 16)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    kept = [own.clone() for own in first]
    second = torch.autograd.grad(loss, (hidden, weight))
    assert all(map(torch.equal, kept, second))
    assert all(map(torch.equal, kept, first))


@pytest.mark.usefixtures("rows")
def test_pieces_of_logits_change_no_bit_and_bound_their_copies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(losses, "chunk_tokens", lambda tokens: 55)
    found, peaks = [], []
    for piece in (1 << 30, 4 * 55 * 7):
        monkeypatch.setattr(losses, "PIECE_BYTES", piece)
        hidden, weight, targets = half_batch(0)
        with Ledger() as ledger:
            logs = losses._forward(hidden.detach(), weight.detach(), targets, 16, None, None)[1]
            ledger.restart()
            before = ledger.now.total
            given = hidden.detach(), weight.detach(), targets, logs
            found.append(losses._weight_by_rows(*given))
        peaks.append(ledger.peak.total - before)
    assert torch.equal(*found)
    assert peaks[1] < peaks[0] / 2


def test_only_large_heads_in_half_precision_and_several_chunks_go_by_rows() -> None:
    def head(rows: int, dtype: Any = torch.bfloat16) -> torch.Tensor:
        return torch.empty(rows, 4096, dtype=dtype, device="meta")

    assert by_rows(head(32000), 2048, 524)
    assert not by_rows(head(32000, torch.float32), 2048, 524)
    assert not by_rows(head(32000), 512, 524)
    assert not by_rows(head(1000), 2048, 524)
