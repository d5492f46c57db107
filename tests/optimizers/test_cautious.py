"""Cautious Adafactor equals its fp64 reference; its quantised momentum, and what wrong use does."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import references_newer as references
import torch
from forked import run
from support import matrix, tiny_model
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from lowrank.cuda import row_quantized, status, using_kernels
from lowrank.cuda.noise import mix, uniform
from lowrank.optimizers import CautiousAdafactor, build, expected_state_bytes, state_bytes
from lowrank.optimizers.engine.processes import Processes
from lowrank.optimizers.engine.sharding import Part
from lowrank.optimizers.rules import CautiousFactored

SHAPES = ((14, 9), (9, 150))


def gradients(shape: tuple[int, int], steps: int = 12) -> list[Tensor]:
    return [1e-2 * (matrix(*shape, 1) + 0.9 * matrix(*shape, k + 2)) for k in range(steps)]


def train(made: torch.optim.Optimizer, weight: nn.Parameter, grads: list[Tensor]) -> Tensor:
    for grad in grads:
        weight.grad = grad.to(weight.dtype).clone()
        made.step()
    return weight.detach()


def read_back(moment: Tensor, step: int, bits: int) -> Tensor:
    """What quantisation makes of a moment: by the definition, block by block."""
    largest, noise = row_quantized.LARGEST[bits], uniform(moment.numel(), mix(20261128, step), 0)
    noise = noise.view(moment.shape) if bits == 4 else torch.full(moment.shape, 0.5)
    made = torch.empty_like(moment)
    for start in range(0, moment.shape[1], 128):
        block = moment[:, start : start + 128].float()
        scale = block.abs().amax(1, keepdim=True) * (1 / largest)
        codes = (block * (1 / scale) + noise[:, start : start + 128]).floor()
        made[:, start : start + 128] = (codes.clamp(-largest, largest) * scale).double()
    return made


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bits", [4, 8, 32])
@pytest.mark.parametrize("cautious", [True, False])
def test_equals_the_reference(shape: tuple[int, int], bits: int, cautious: bool) -> None:
    weight, grads = nn.Parameter(0.2 * matrix(*shape, 0)), gradients(shape)
    stored = {} if bits == 32 else {"stored": partial(read_back, bits=bits)}
    expected = references.cautious(
        grads, weight, lr=0.02, mask=cautious, weight_decay=0.1, **stored
    )
    options = {"cautious": cautious, "momentum_bits": bits}
    made = CautiousAdafactor([weight], lr=0.02, weight_decay=0.1, min_quantized_size=0, **options)
    torch.testing.assert_close(train(made, weight, grads), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [1, 7, 128, 301])
def test_quantised_rows(bits: int, columns: int) -> None:
    """Each entry within a step of its block's, zeros exact, each row by itself."""
    rows = matrix(6, columns, 3).float()
    rows[2] = 0.0
    noise = torch.rand(6, columns, generator=torch.Generator().manual_seed(0))
    for given in (None, noise):
        codes, scales = row_quantized.quantize(rows, bits, given)
        assert codes.shape == (6, -(-columns * bits // 8))
        made = row_quantized.dequantize(codes, scales, columns, bits)
        steps = scales.repeat_interleave(128, 1)[:, :columns]
        assert bool(((made - rows).abs() <= steps * (0.5001 if given is None else 1.0)).all())
        assert torch.equal(made[2], rows[2])
        own = row_quantized.quantize(rows[4:], bits, None if given is None else given[4:])
        assert torch.equal(own[0], codes[4:])
        assert torch.equal(own[1], scales[4:])
    bytes_of_a_row = codes[0].nbytes + scales[0].nbytes
    assert bytes_of_a_row == row_quantized.row_bytes(columns, bits)
    zero = row_quantized.empty(6, columns, bits, rows.device)
    assert not row_quantized.dequantize(*zero, columns, bits).any()


def test_four_bits_are_unbiased_and_decay() -> None:
    """To the nearest code 0.9 x 1 step is 1 step again, for ever."""
    start = torch.full((1, 128), 1.0)
    start[0, 0] = 7.0
    codes, scales = row_quantized.quantize(0.9 * start + 0.1 * 7 * (start == 7), 4)
    assert row_quantized.dequantize(codes, scales, 128, 4)[0, 1] == pytest.approx(1.0)
    means = []
    for step in range(400):
        noise = row_quantized.noise_of(1, 128, row_quantized.seed_of(step), 0, 128, start.device)
        codes, scales = row_quantized.quantize(0.3 * start + 0.7 * 7 * (start == 7), 4, noise)
        means.append(float(row_quantized.dequantize(codes, scales, 128, 4)[0, 1:].mean()))
    assert sum(means) / 400 == pytest.approx(0.3, abs=0.01)


def test_noise_is_that_of_the_place() -> None:
    device = torch.device("cpu")
    seed = row_quantized.seed_of(5)
    whole = row_quantized.noise_of(6, 20, seed, 0, 20, device)
    part = row_quantized.noise_of(3, 7, seed, 2 * 20 + 8, 20, device)
    assert torch.equal(part, whole[2:5, 8:15])
    another = row_quantized.seed_of(6)
    assert not torch.equal(whole, row_quantized.noise_of(6, 20, another, 0, 20, device))


def test_zero_gradients_and_dead_rows() -> None:
    weight = nn.Parameter(0.2 * matrix(9, 14, 0))
    before = weight.detach().clone()
    grads = gradients((9, 14), 6)
    for grad in grads:
        grad[3], grad[:, 5] = 0.0, 0.0
    grads[0], grads[2] = torch.zeros(9, 14).double(), torch.zeros(9, 14).double()
    made = CautiousAdafactor([weight], lr=0.1, min_quantized_size=0)
    train(made, weight, grads[:1])
    assert torch.equal(weight, before)
    train(made, weight, grads[1:])
    assert torch.equal(weight[3], before[3])
    assert torch.equal(weight[:, 5], before[:, 5])
    assert bool(weight.isfinite().all())
    assert not torch.equal(weight, before)


def test_what_rests_is_made_up_for_in_its_row() -> None:
    """An update's sign is its gradient's or zero, and a row's mean |D| keeps its order."""
    grads = gradients((9, 150), 8)
    last = []
    for cautious in (True, False):
        weight = nn.Parameter(0.2 * matrix(9, 150, 0))
        made = CautiousAdafactor([weight], lr=0.1, cautious=cautious)
        train(made, weight, grads[:-1])
        before = weight.detach().clone()
        last.append(before - train(made, weight, grads[-1:]))
    masked, plain = last
    assert bool((masked * grads[-1] >= 0).all())
    assert 0.1 < float((masked == 0).double().mean()) < 0.6
    ratio = masked.abs().mean(1) / plain.abs().mean(1)
    assert bool((ratio > 0.9).all())
    assert bool((ratio < 2.0).all())


def test_a_model_is_sorted() -> None:
    model = tiny_model()
    made = build("cautious_adafactor", model, plain_lr=0.5, min_quantized_size=0)
    hidden = model.mlp["up_proj"].weight
    assert made.state[hidden]["exp_avg"].dtype == torch.uint8
    for name in ("embed_tokens.weight", "lm_head.weight"):
        factors = {"step", "exp_avg_sq_row", "exp_avg_sq_col"}
        assert made.state[model.get_parameter(name)].keys() == factors
    assert [group["momentum_bits"] for group in made.param_groups] == [4, None, None]
    assert [group["lr"] for group in made.param_groups] == [1e-3, 0.5, 0.5]


@pytest.mark.parametrize("bits", [4, 8, 32])
def test_bytes(bits: int) -> None:
    model = tiny_model()
    options = {"momentum_bits": bits, "min_quantized_size": 64}
    made = build("cautious_adafactor", model, **options)
    assert state_bytes(made) == expected_state_bytes("cautious_adafactor", model, **options)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("momentum_bits", 16), ("cautious", "yes"), ("betas", (1.0, 0.9))),
        *(("min_quantized_size", -1), ("clip_threshold", 0.0), ("decay_rate", 0.5)),
    ],
)
def test_refused(option: str, value: object) -> None:
    with pytest.raises(ValueError, match=option):
        build("cautious_adafactor", tiny_model(), **{option: value})


def test_wrong_use_speaks() -> None:
    with pytest.raises(ValueError, match="1-dimensional: accepted are matrices"):
        CautiousAdafactor([nn.Parameter(torch.ones(4))])
    with pytest.warns(UserWarning, match="no parameter group has momentum_bits") as caught:
        CautiousAdafactor(tiny_model().parameters(), momentum_bits=None)
    assert len(caught) == 1


def test_columns_that_cut_blocks_are_refused() -> None:
    part = Part((12, 9), 0, 0, 6, Processes(None, 2, 0), (), 108, transposed=True)
    rule = CautiousFactored(1e-3, min_quantized_size=0)
    with pytest.raises(ValueError, match=r"up\.weight is spread by columns, 6 a process, which"):
        rule.check_part(part, "up.weight")
    CautiousFactored(1e-3).check_part(part, "up.weight")
    rule.check_part(part.mirror(), "up.weight")


class Moe(nn.Module):
    """Three experts of 12 x 10 in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Module()
        self.mlp.experts = nn.Parameter(0.1 * matrix(36, 10, 5).view(3, 12, 10))


@pytest.mark.parametrize("bits", [4, 32])
def test_each_expert_is_a_matrix(bits: int) -> None:
    stacked = Moe()
    single = [nn.Parameter(expert.clone()) for expert in stacked.mlp.experts.detach()]
    options = {"lr": 1e-2, "momentum_bits": bits, "min_quantized_size": 0}
    made = build("cautious_adafactor", stacked, **options)
    others = [CautiousAdafactor([weight], **options) for weight in single]
    for step in range(4):
        grads = [matrix(12, 10, 9 * i + step) for i in range(3)]
        grads[1] = grads[1] if step else torch.zeros(12, 10).double()
        stacked.mlp.experts.grad = torch.stack(grads)
        made.step()
        for weight, grad, other in zip(single, grads, others, strict=True):
            train(other, weight, [grad])
    for i, weight in enumerate(single):
        assert torch.equal(stacked.mlp.experts[i], weight)


def spread(rank: int, world: int, folder: Path) -> dict[tuple[int, int], Tensor]:
    """A weight of 7 x 256 after some steps, spread along each of its dimensions."""
    mesh, made = DeviceMesh("cpu", torch.arange(world)), {}
    for bits in (4, 32):
        for dim in (0, 1):
            whole, grads = nn.Parameter(0.2 * matrix(7, 256, 0)), gradients((7, 256), 6)
            weight = nn.Parameter(distribute_tensor(whole.detach(), mesh, [Shard(dim)]))
            own = CautiousAdafactor([weight], lr=0.02, momentum_bits=bits, min_quantized_size=0)
            for grad in grads:
                weight.grad = distribute_tensor(grad, mesh, [Shard(dim)])
                own.step()
            made[bits, dim] = weight.full_tensor().detach()
            alone = CautiousAdafactor([whole], lr=0.02, momentum_bits=bits, min_quantized_size=0)
            train(alone, whole, grads)
            made[bits, -1] = whole.detach()
    return made


@pytest.mark.slow
def test_rows_or_columns_may_be_spread(tmp_path: Path) -> None:
    made = run(spread, 2, tmp_path)[0]
    for (bits, dim), weight in made.items():
        torch.testing.assert_close(
            weight, made[bits, -1], rtol=1e-9, atol=1e-11, msg=f"{bits}, {dim}"
        )


@pytest.mark.skipif(status("host").library is None, reason="the host's library is not compiled")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_has_the_bits_of_plain_torch(bits: int, dtype: torch.dtype) -> None:
    made = []
    for kernels in ("native", "torch"):
        weight = nn.Parameter((0.2 * matrix(70, 150, 0)).to(dtype))
        optimizer = CautiousAdafactor([weight], lr=0.02, momentum_bits=bits, weight_decay=0.1)
        with using_kernels(kernels):
            train(optimizer, weight, gradients((70, 150)))
        made.append([weight.detach(), *optimizer.state[weight].values()])
    for ours, theirs in zip(*made, strict=True):
        assert not isinstance(ours, Tensor) or torch.equal(ours, theirs)
