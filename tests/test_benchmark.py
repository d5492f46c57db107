"""The benchmark harness: pairing, orders, workload, and one tiny run of each benchmark."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import ROOT

from lowrank.optimizers.projectors.correlation import correlation_gradient

TINY = ((4, 24, 16), (2, 16, 40), (2, 16, 16))


@pytest.fixture(autouse=True)
def _scripts_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))


def part(name: str) -> Any:
    return importlib.import_module(f"benchmarks.{name}")


def test_ratios_are_paired_within_a_round() -> None:
    # A slow second round slows both sides: the ratio stays 2, that of the means would not.
    spread = part("timing").paired_ratios([2.0, 200.0, 2.0], [1.0, 100.0, 1.0])
    assert (spread.lower, spread.median, spread.upper) == (2.0, 2.0, 2.0)


def test_spread_of_few_samples() -> None:
    spread_of = part("timing").Spread.of
    assert spread_of([3.0]).as_dict() == {"median": 3.0, "lower": 3.0, "upper": 3.0}
    assert spread_of([4.0, 1.0, 2.0, 3.0, 5.0]).as_dict() == {
        "median": 3.0,
        "lower": 2.0,
        "upper": 4.0,
    }
    with pytest.raises(ValueError, match="no samples"):
        spread_of([])


def test_round_robin_calls_everyone_once_a_round_in_changing_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(part("timing"), "canary", lambda: 1.0)
    calls: list[tuple[int, str]] = []

    def contestant(name: str) -> Any:
        return lambda number: calls.append((number, name)) or float(number)

    samples, canaries = part("timing").round_robin(
        {name: contestant(name) for name in "abcd"}, rounds=3
    )
    assert samples == {name: [float(number) for number in range(3)] for name in "abcd"}
    assert len(canaries) == 4
    orders = {tuple(calls[4 * number : 4 * number + 4]) for number in range(3)}
    assert all(len({name for _, name in order}) == 4 for order in orders)
    assert len({tuple(name for _, name in order) for order in orders}) > 1
    with pytest.raises(ValueError, match="rounds is 0"):
        part("timing").round_robin({}, rounds=0)


def test_a_busy_machine_is_noticed() -> None:
    assert not part("timing").disturbed([10.0, 10.4, 10.1])
    assert part("timing").disturbed([10.0, 10.4, 14.0])


def test_workload_is_the_projected_part_of_llama_60m() -> None:
    sizes = part("workload").Workload().sizes()
    assert len(sizes) == 56
    assert sum(m * n for m, n in sizes) == 25_296_896
    assert {size: sizes.count(size) for size in sizes} == {
        (512, 512): 32,
        (1376, 512): 16,
        (512, 1376): 8,
    }
    with pytest.raises(ValueError, match="rank is 600"):
        part("workload").Workload(rank=600)


def test_the_floor_does_what_a_projected_step_does() -> None:
    work = part("workload").Workload(shapes=TINY, rank=16)
    floor = part("contestants").gemm_floor(work)
    floor.take(work.gradients(1)[0])
    with torch.no_grad():
        for weight in floor.parameters:
            weight.zero_()
    floor.step()
    # At full rank the two GEMMs cancel: W - lr P P^T G is plain gradient descent.
    for weight in floor.parameters:
        gradient = weight.grad
        assert gradient is not None
        assert gradient.abs().amax() > 1e-3
        torch.testing.assert_close(weight.detach() / -1e-6, gradient, atol=1e-6, rtol=1e-4)


def test_both_sides_of_coap_compute_the_same_gradient() -> None:
    module = part("correlation")
    work = part("workload").Workload(shapes=TINY, rank=4)
    (gradients,) = work.gradients(1)
    for grad_mn, basis_dr, moment in module.problems(work, gradients):
        side = module.Side.RIGHT if grad_mn.shape[0] >= grad_mn.shape[1] else module.Side.LEFT
        closed_dr = correlation_gradient(grad_mn, basis_dr, moment, side)
        leaf_dr = basis_dr.clone().requires_grad_()
        expected_dr = module.autograd_gradient(grad_mn, leaf_dr, moment)
        # Relative to the whole: the update is far below the basis's own rounding.
        assert expected_dr.norm() > 0
        assert (closed_dr - expected_dr).norm() < 1e-5 * expected_dr.norm()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["step", "refresh", "coap", "layers", "kernels"])
def test_each_benchmark_runs_and_is_recorded(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(part("kernels"), "ENTRIES", 4096)
    work = part("workload").Workload(shapes=TINY, rank=4)
    result = part("measure").BENCHMARKS[name](work, 2, lambda text: None)
    path = part("results").write(result, tmp_path / "new", "./scripts/benchmark ...")
    record = json.loads(path.read_text("utf-8"))
    assert record["benchmark"] == name
    assert record["machine"]["threads"] == torch.get_num_threads()
    assert record["versions"]["torch"] == torch.__version__
    wanted = {
        "step": {"gemm_floor", "adamw_fused", "galore", "galore_bf16", "fira_ours", "coap"},
        "refresh": {"svd", "eigh", "randomized", "warm"},
        "coap": {"autograd", "closed_form"},
        "layers": {"dense", "sst_adamw", "sst_adamw autograd", "sltrain_adamw autograd"},
        "kernels": {"8-bit Adam, native", "8-bit Adam, torch", "GaLoreAdamW8bit step, native"},
    }
    assert wanted[name] <= set(record["results"])
    for row in record["results"].values():
        assert len(row["samples_ms"]) == 2
    if name == "refresh":
        energies = {key: row["captured_energy"] for key, row in record["results"].items()}
        assert energies["eigh"] == pytest.approx(energies["svd"], abs=1e-5)
        assert energies["svd"] >= energies["warm"] - 1e-6
    elif name == "step":
        assert record["results"]["galore"]["ratio_to"]["gemm_floor"]["median"] > 0
    elif name == "layers":
        results = record["results"]
        assert results["sltrain_adamw"]["KiB"] < results["dense"]["KiB"]
        assert results["sst_adamw"]["x_autograd"] > 0
    elif name == "kernels":
        assert record["results"]["8-bit Adam, native"]["times_as_fast"] > 0
    else:
        assert record["results"]["closed_form"]["ratio_to"]["autograd"]["median"] > 0
    assert result.table().row_count == len(record["results"])


def test_mistakes_end_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    main = part("__main__").main
    assert main(["step", "--rounds", "0"]) == 2
    error = capsys.readouterr().err
    assert error == "benchmark: --rounds is 0; it must be 1 or more\n"
    assert main(["step", "--rank", "4096"]) == 2
    assert "rank is 4096" in capsys.readouterr().err
