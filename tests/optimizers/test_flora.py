"""Flora: equal to the rule written out with whole matrices, without ever making one."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import references
import references_beyond
import torch
from support import matrix
from torch import Tensor, nn

from lowrank.cuda.noise import mix
from lowrank.optimizers import Adafactor, FloraAdafactor, state_bytes
from lowrank.optimizers.engine import chunks
from lowrank.optimizers.projectors.random import gaussian
from lowrank.optimizers.rules.flora import FloraRule, moment_growth, smallest_gap

SHAPES = ((14, 9), (9, 14), (11, 11))


def gradients(shape: tuple[int, int], steps: int = 12) -> list[Tensor]:
    # a size that jumps makes the clipping act
    return [
        1e-2 * (1.0 + 3 * (k % 4)) * (matrix(*shape, 1) + 0.6 * matrix(*shape, k + 2))
        for k in range(steps)
    ]


def train(made: torch.optim.Optimizer, weight: nn.Parameter, grads: list[Tensor]) -> Tensor:
    for grad in grads:
        weight.grad = grad.to(weight.dtype).clone()
        made.step()
    return weight.detach()


@pytest.mark.filterwarnings("ignore:.*grows without bound")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("side", ["std", "reverse_std", "left", "right"])
@pytest.mark.parametrize("scale_parameter", [True, False])
@pytest.mark.parametrize("beta1", [0.9, None])
@pytest.mark.parametrize("chunk", [20, 1 << 18])
def test_equals_the_written_out_rule(
    shape: tuple[int, int],
    side: str,
    scale_parameter: bool,
    beta1: float | None,
    chunk: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three moves of the moment, clipping, decay; row chunks of one row and of all."""
    monkeypatch.setattr(chunks, "CACHE_ELEMENTS", chunk)
    weight, grads = nn.Parameter(0.2 * matrix(*shape, 0)), gradients(shape)
    start = weight.detach().clone()
    group = {"params": [weight], "rank": 4, "kappa": 4, "proj_type": side, "seed": 7}
    made = FloraAdafactor(
        [group], lr=0.02, beta1=beta1, weight_decay=0.1, scale_parameter=scale_parameter
    )
    left = {"left": True, "right": False, "std": shape[0] < shape[1]}.get(
        side, shape[0] >= shape[1]
    )
    size = (shape[0] if left else shape[1], 4)
    number = made.state[weight]["matrix"]

    def bases_at(period: int) -> references_beyond.Bases:
        basis = gaussian(size, mix(7, number, period), start)
        return references_beyond.one_sided(basis, left)

    expected = references_beyond.flora(
        grads,
        start,
        bases_at,
        kappa=4,
        lr=0.02,
        beta1=beta1,
        weight_decay=0.1,
        scale_parameter=scale_parameter,
    )
    torch.testing.assert_close(train(made, weight, grads), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.filterwarnings("ignore:.*grows without bound")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_with_all_coordinates_it_is_adafactor(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A = I in place of the random matrix: nothing is compressed."""

    def unit(self: Any, state: Any, geometry: Any, period: int, like: Tensor) -> Tensor:
        return torch.eye(geometry.rank, dtype=like.dtype)

    monkeypatch.setattr(FloraRule, "basis", unit)
    ours, plain = (nn.Parameter(0.2 * matrix(*shape, 0)) for _ in range(2))
    options: dict[str, Any] = {"lr": 0.02, "beta1": 0.9, "weight_decay": 0.1}
    made = FloraAdafactor([{"params": [ours], "rank": 99, "kappa": 4}], **options)
    grads = gradients(shape)
    expected = train(Adafactor([plain], **options), plain, grads)
    torch.testing.assert_close(train(made, ours, grads), expected, rtol=1e-9, atol=1e-10)


def test_plain_groups_are_adafactor() -> None:
    grads = gradients((9, 14))
    ours, plain = (nn.Parameter(0.2 * matrix(9, 14, 0)) for _ in range(2))
    other = nn.Parameter(torch.zeros(4, 4))
    made = FloraAdafactor([{"params": [ours]}, {"params": [other], "rank": 2}], lr=0.02)
    expected = train(Adafactor([plain], lr=0.02, beta1=0.9), plain, grads)
    assert torch.equal(train(made, ours, grads), expected)


@pytest.mark.filterwarnings("ignore:.*grows without bound")
@pytest.mark.slow
def test_the_moment_is_an_unbiased_sketch() -> None:
    """Averaged over seeds the compressed momentum is the momentum."""
    grads, total = gradients((9, 14), 4), torch.zeros(9, 14, dtype=torch.float64)
    plain = nn.Parameter(torch.zeros(9, 14, dtype=torch.float64))
    options: dict[str, Any] = {"lr": 0.02, "beta1": 0.9, "scale_parameter": False}
    expected = train(Adafactor([plain], **options), plain, grads)
    for seed in range(400):
        weight = nn.Parameter(torch.zeros(9, 14, dtype=torch.float64))
        group = {"params": [weight], "rank": 4, "kappa": 3, "seed": seed}
        total += train(FloraAdafactor([group], **options), weight, grads)
    assert (total / 400 - expected).norm() < 0.15 * expected.norm()


def test_memory_is_the_moment_and_the_factors() -> None:
    weight = nn.Parameter(torch.zeros(96, 200, dtype=torch.bfloat16))
    made = FloraAdafactor([{"params": [weight], "rank": 16}], lr=1e-3)
    assert state_bytes(made) == 4 * (16 * 200 + 96 + 200) + 4


def test_matrices_have_seeds_of_their_own_that_are_saved() -> None:
    pair = [nn.Parameter(torch.zeros(8, 12)) for _ in range(2)]
    made = FloraAdafactor([{"params": pair, "rank": 2}], lr=1e-3)
    third = nn.Parameter(torch.zeros(8, 12))
    made.add_param_group({"params": [third], "rank": 2})
    numbers = [made.state[p]["matrix"] for p in (*pair, third)]
    assert numbers == [mix(0, f"param.{i}") >> 1 for i in range(3)]
    assert len(set(numbers)) == 3
    assert max(numbers) < 1 << 63  # an int64 holds it
    for weight in (*pair, third):
        weight.grad = matrix(8, 12, 1).float()
    made.step()
    moments = [made.state[p]["exp_avg"] for p in (*pair, third)]
    assert not torch.equal(moments[0], moments[1])
    # another order of the same matrices, as in a resumed run: the saved numbers count
    saved = made.state_dict()
    assert [saved["state"][i]["matrix"] for i in range(3)] == numbers


def test_what_makes_no_sense_raises() -> None:
    group = {"params": [nn.Parameter(torch.zeros(8, 12))], "rank": 2}
    for name, value in (("residual", "norm_scaled"), ("moments", "reset"), ("stagger", True)):
        with pytest.raises(ValueError, match=f"{name}={value!r}: FloraAdafactor accepts"):
            FloraAdafactor([{**group, name: value}], lr=1e-3)
    with pytest.raises(ValueError, match="proj_type='full'"):
        FloraAdafactor([{**group, "proj_type": "full"}], lr=1e-3)
    with pytest.raises(ValueError, match="kappa=5 with update_proj_gap=6"):
        FloraAdafactor([{**group, "kappa": 5, "update_proj_gap": 6}], lr=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_whole_temporary(dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.zeros(1024, 2048, dtype=dtype))
    made = FloraAdafactor([{"params": [weight], "rank": 8}], lr=0.01, skip_nonfinite=False)
    weight.grad = torch.randn(1024, 2048).to(dtype)
    made.step()
    with torch.profiler.profile(profile_memory=True) as profile:
        made.step()
    assert max(event.cpu_memory_usage for event in profile.events()) < 1024 * 2048 * 4 / 4


def test_reference_without_momentum_is_adafactors() -> None:
    """The two references agree where they overlap."""
    grads, weight = gradients((9, 14)), 0.2 * matrix(9, 14, 0)
    first = references_beyond.flora(
        grads, weight, lambda _: (None, None), kappa=4, lr=0.02, beta1=None
    )
    second = references.adafactor(grads, weight, lr=0.02)
    torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-13)


def test_a_move_multiplies_the_mean_square_as_derived() -> None:
    """Three moves of a fixed moment, over many seeds, against (1 + (d + 1) / r)^3."""
    d, r, seeds = 12, 4, 20000
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(seeds, 3, d, r, generator=generator, dtype=torch.float64) * r**-0.5
    stands_for = torch.nn.functional.normalize(matrix(d, 1, 3), dim=0).expand(seeds, d, 1)
    for move in range(3):
        stands_for = drawn[:, move] @ (drawn[:, move].mT @ stands_for)
        expected = moment_growth(d, r, 1.0, 1) ** (move + 1)
        assert expected == (1 + 13 / 4) ** (move + 1)
        found = float(stands_for.square().sum((1, 2)).mean())
        assert found == pytest.approx(expected, rel=0.02 * 3**move)


def test_the_smallest_gap_is_where_the_growth_falls_below_one() -> None:
    for d, r, beta1 in ((256, 16, 0.9), (4096, 128, 0.9), (768, 768, 0.99), (64, 1, 0.5)):
        gap = smallest_gap(d, r, beta1)
        assert moment_growth(d, r, beta1, gap) < 1 <= moment_growth(d, r, beta1, gap - 1)
    assert smallest_gap(64, 4, 0.0) == smallest_gap(8, 8, 0.1) == 1


@pytest.mark.parametrize(("kappa", "stable"), [(14, True), (10, False)])
def test_the_moment_grows_on_one_side_of_the_threshold(kappa: int, stable: bool) -> None:
    """d = 256, r = 16, beta1 = 0.9: stable from kappa = 14 on; 10 multiplies by 2 a move."""
    assert smallest_gap(256, 16, 0.9) == 14
    weight = nn.Parameter(torch.zeros(256, 16, dtype=torch.float64))
    group = {"params": [weight], "rank": 16, "kappa": kappa, "proj_type": "left"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = FloraAdafactor([group], lr=1e-3, scale_parameter=False)
    assert [str(w.message) for w in caught if "grows without bound" in str(w.message)] == (
        []
        if stable
        else [
            "update_proj_gap=10 with beta1=0.9 and random matrices of 256 x 16: each move of the "
            "moment multiplies its mean square by 2.07, so that it grows without bound; accepted "
            "are update_proj_gap=14 or more, a higher rank, a lower beta1 or none"
        ]
    )
    assert all(w.filename == __file__ for w in caught)
    norms = []
    for step in range(30 * kappa):
        weight.grad = matrix(256, 16, step)
        made.step()
        norms.append(float(made.state[weight]["exp_avg"].norm()))
    early, late = max(norms[:kappa]), max(norms[-kappa:])
    assert late < 4 * early if stable else late > 1e3 * early


def test_the_growth_is_said_once_and_again_for_other_options() -> None:
    params = [nn.Parameter(torch.zeros(8, 64 * (k + 1))) for k in range(3)]
    group = {"params": params, "rank": 2, "kappa": 2, "proj_type": "right"}
    with pytest.warns(UserWarning, match="of 192 x 2: .* accepted are update_proj_gap=22 or more"):
        made = FloraAdafactor([group], lr=1e-3)
    for param in params:
        param.grad = torch.ones_like(param)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made.step()
        made.param_groups[0]["update_proj_gap"] = 30
        made.step()
    made.param_groups[0]["update_proj_gap"] = 3
    with pytest.warns(UserWarning, match="update_proj_gap=3 with beta1"):
        made.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FloraAdafactor([group], lr=1e-3, beta1=None)
