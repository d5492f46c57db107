"""gpu-check: each section at tiny sizes on a CPU, and what its parts compute."""

from __future__ import annotations

import importlib
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from stand_ins import context, on_gpu, part, ran
from support import ROOT
from torch import nn

from lowrank.cuda import ops, status
from lowrank.optimizers import build, state_bytes

needs_library = pytest.mark.skipif(
    status("host").library is None, reason="the host's library is not compiled"
)


@pytest.fixture(autouse=True)
def _no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which takes long among the objects of all tests."""
    monkeypatch.setattr(part("record"), "release", lambda: None)


@pytest.fixture
def _path() -> Iterator[None]:
    """`kernels` adds the tests' folders."""
    before = list(sys.path)
    yield
    sys.path[:] = before


# Sections


def test_rates_are_measured_and_read_by_the_others(file: Path) -> None:
    record = ran("rates", file)
    rates = part("section").read_rates(file)
    assert rates.copy == pytest.approx(1e9 * record.value("rate", "copy"))
    assert rates.bf16 == pytest.approx(1e9 * record.value("rate", "bf16 GEMM"))
    assert rates.fp64 == pytest.approx(1e9 * record.value("rate", "fp64 GEMM"))
    assert rates.tf32 is None  # which a CPU has not
    assert rates.launch == pytest.approx(1e-3 * record.value("rate", part("rates").LAUNCH))
    assert record.facts["torch"] == torch.__version__
    assert part("section").read_rates(file.parent / "none") is None


@needs_library
def test_build_loads_and_calls_every_kind_of_kernel(file: Path) -> None:
    record = ran("build", file)
    assert [check["passed"] for check in record.checks] == [True, True]
    assert "operations" in record.checks[1]["detail"]
    assert record.value("build", "already there") is not None


@needs_library
@pytest.mark.slow
@pytest.mark.usefixtures("_path")
def test_kernels_compares_all_cases_and_measures_all_kernels(file: Path) -> None:
    record = ran("kernels", file)
    names = {check["name"] for check in record.checks}
    assert names == set(record.facts["to_compare"])
    assert all(check["passed"] for check in record.checks)
    assert {name for name in names if name.startswith(("kernel: ", "exact: "))} >= {
        *(f"kernel: {case}" for case in ("adam", "adam_8bit", "int4_quantize", "write_back_int8")),
        "exact: blockwise",
    }
    measured = {row.name for row in record.rows if row.group == "bytes"}
    assert measured == part("bandwidth").kernels(1 << 10, torch.device("cpu")).keys()
    assert record.skipped == []


@pytest.mark.slow
def test_steps_measures_every_method_at_every_size(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(part("modelled"), "MOST", 1.0)
    record = ran("steps", file)
    methods = part("methods")
    both = {method.label for method in (*methods.CORE, *methods.OTHERS)}
    for name, expected in (("60m", both), ("1b", both), ("7b", {m.label for m in methods.CORE})):
        found = {row.name for row in record.rows if row.group == name}
        measured = {label for label in found if not label.endswith(("plain torch", ": modelled"))}
        assert measured == expected
    row = next(row for row in record.rows if row.name == "galore_adamw")
    assert row.details["of_floor"] == pytest.approx(row.value / row.details["floor_ms"])
    assert row.details["operations"] > 10
    assert row.aim is None  # a CPU's sizes say nothing
    assert "x AdamW" in row.note
    assert record.value("60m", "galore_adamw: modelled") == row.details["modelled_ms"]


@pytest.mark.slow
def test_refresh_measures_all_ways_and_checks_their_energy(file: Path) -> None:
    record = ran("refresh", file)
    names = {row.name for row in record.rows if row.group == "1b"}
    modes = {"randomized", "warm", "randomized, unrotated", "warm, unrotated", "eigh"}
    assert names >= modes | {f"{mode}: energy" for mode in modes} | {"torch.linalg.svd"}
    assert names >= {f"{mode}: share of torch.linalg.svd" for mode in modes}
    assert all(check["passed"] for check in record.checks)
    assert len(record.checks) == 2 * len([r for r in record.rows if r.name.endswith("energy")])
    energies = [row.value for row in record.rows if row.name == "eigh: energy"]
    assert energies == pytest.approx([1.0] * len(energies), abs=5e-3)


@pytest.mark.slow
def test_memory_checks_the_state_and_has_each_phase(file: Path) -> None:
    record = ran("memory", file)
    assert all(check["passed"] for check in record.checks)
    names = [check["name"] for check in record.checks if "pretraining" not in check["name"]]
    assert sum("state bytes" in name for name in names) == 11
    row = next(row for row in record.rows if row.name == "galore_adamw_8bit: peak")
    phases = ["model", "optimizer", "forward 0", "backward 0", "step 0", "zero_grad 0"]
    assert list(row.details["peaks"])[:6] == phases
    model = part("workload").SIZES["tiny"].models["60m"]
    assert row.details["weight_bytes"] == 2 * model.parameters()
    held = row.details["weight_bytes"] + row.details["gradient_bytes"] + row.details["state_bytes"]
    assert row.details["peaks"]["backward 1"] >= held
    # Gradients are there after a backward pass, and gone afterwards.
    freed = row.details["ends"]["step 1"] - row.details["ends"]["zero_grad 1"]
    assert freed >= row.details["gradient_bytes"]


@pytest.mark.parametrize("name", ["steps", "launches", "refresh", "memory", "kernels"])
@pytest.mark.usefixtures("_path")
def test_a_section_without_time_says_what_it_left_out(file: Path, name: str) -> None:
    record = ran(name, file, context(seconds=0.0))
    assert record.rows == [] or {row.group for row in record.rows} == {"host"}
    assert {entry["why"] for entry in record.skipped} == {"no time left"}


# Parts


def test_a_wrong_kernel_is_found_with_its_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tests/cuda"))
    draws, cases = importlib.import_module("draws"), importlib.import_module("kernel_cases")
    schema, plain, _ = ops.OPERATIONS["rademacher"]

    def wrong(out: torch.Tensor, seed: int) -> bool:
        plain(out, seed)
        out[-1] *= -1
        return True

    monkeypatch.setitem(ops.OPERATIONS, "rademacher", (schema, plain, wrong))
    found = part("kernels").draw_cases(cases.rademacher, draws.SeededDraw, context())
    assert (found["draws"], found["seed"]) == (1, 0)
    assert "seed 0: Tensor-likes are not equal! Mismatched elements: 1 /" in found["detail"]


def test_what_fails_on_a_gpu_meets_a_reference_on_the_cpu_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tests/cuda"))
    draws, cases = importlib.import_module("draws"), importlib.import_module("kernel_cases")
    schema, plain, _ = ops.OPERATIONS["rademacher"]
    calls: list[int] = []

    def wrong_once(out: torch.Tensor, seed: int) -> bool:
        plain(out, seed)
        calls.append(seed)
        if len(calls) == 1:
            out[-1] *= -1
        return True

    monkeypatch.setitem(ops.OPERATIONS, "rademacher", (schema, plain, wrong_once))
    found = part("kernels").draw_cases(cases.rademacher, draws.SeededDraw, on_gpu())
    assert calls[0] == calls[1]  # the same input
    assert found["with_a_reference_on_the_cpu"] == "equal"
    assert found["detail"].endswith("with a reference on the CPU: equal")


def test_plain_torch_is_compared_with_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("tests/cuda", "tests"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    found: dict[str, Any] = {}
    part("kernels")._add_plain(found, on_gpu())
    compare = found["plain torch on the GPU and the CPU: int4_quantize"]
    assert compare() == {"draws": 1}
    schema, plain, kernel = ops.OPERATIONS["quantize_int4"]
    calls: list[int] = []

    def differs(x: torch.Tensor, codes: torch.Tensor, *others: Any) -> None:
        plain(x, codes, *others)
        calls.append(1)
        codes += len(calls)

    monkeypatch.setitem(ops.OPERATIONS, "quantize_int4", (schema, differs, kernel))
    assert "seed 0" in compare()["detail"]


def test_another_checkout_is_not_measured(file: Path, tmp_path: Path) -> None:
    section = part("section")
    about = context()
    elsewhere = section.Context(tmp_path, about.clock, about.size, about.rates)
    record = part("record").Record("steps", file, {})
    section.run("steps", record, elsewhere)
    assert f"not that of {tmp_path}" in record.errors[0]["message"]
    assert record.rows == []


def test_assertions_without_words_are_named_by_their_line() -> None:
    def holds(device: torch.device) -> None:
        raise AssertionError

    found = part("kernels")._hold(holds, torch.device("cpu"))
    assert re.fullmatch(r"holds, line \d+: raise AssertionError", found["detail"])


def test_a_parameter_without_a_gradient_is_no_step() -> None:
    model = part("workload").SIZES["tiny"].models["60m"]
    matrices = part("workload").made(model, "cpu")
    optimizer = build("galore_adamw", matrices, rank=2)
    with pytest.raises(RuntimeError, match=r"12 of 12 parameters have no gradient"):
        part("steps").check_gradients(optimizer)
    part("workload").fill(matrices)
    part("steps").check_gradients(optimizer)


def test_parameters_that_are_replaced_get_gradients_too() -> None:
    workload, methods = part("workload"), part("methods")
    model = workload.SIZES["tiny"].models["60m"]
    (method,) = (one for one in methods.CORE if "INT8" in one.label)
    matrices = workload.made(model, "cpu")
    optimizer = method.make(matrices, model.rank)
    workload.fill(matrices)
    part("steps").check_gradients(optimizer)


@pytest.mark.parametrize("label", ["galore_adamw", "qgalore_adamw_8bit, INT8 weights", "muon"])
def test_the_state_that_is_planned_for_is_the_real_one(label: str) -> None:
    workload, methods = part("workload"), part("methods")
    model = workload.SIZES["tiny"].models["60m"]
    (method,) = (one for one in (*methods.CORE, *methods.OTHERS) if one.label == label)
    matrices = workload.made(model, "cpu")
    assert method.state_bytes(model) == state_bytes(method.make(matrices, model.rank))


def test_floors_count_bytes_and_products() -> None:
    methods, workload = part("methods"), part("workload")
    model = workload.Model("one", hidden=8, inner=12, layers=1, heads=1, vocabulary=10, rank=2)
    rates = part("section").Rates(copy=1.0, bf16=1.0, fp32=1.0)
    square, wide, plain = 8 * 8, 8 * 12, 2 * 10 * 8 + 3 * 8
    dense = 4 * square + 3 * wide
    state = {"moments": 100, "basis": 10, "other": 7}
    by_label = {m.label: m.floor(model, state, rates) for m in (*methods.CORE, *methods.OTHERS)}
    # Every method reads the gradient once at least, and reads and writes weight and moments.
    common = 6.0 * (dense + plain) + 2 * 110
    assert by_label["torch AdamW, fused"] == by_label["adamw"] == common
    low = 2.0 * 4 * 2 * (4 * 8 + 3 * 12)
    assert by_label["galore_adamw"] == common + 4 * 2 * dense + low
    assert by_label["fira_adamw"] == by_label["galore_adamw"] + 2 * dense
    assert by_label["apollo_adamw"] == common + 2 * dense + 2 * 2 * dense + low / 2
    quantised = by_label["qgalore_adamw_8bit, INT8 weights"]
    assert quantised == pytest.approx(by_label["galore_adamw"] - 2 * dense * (1 - 4 / 256))
    muon = 5 * (4 * (4 * 8**3 + 3 * 8 * 8 * 12) + 2 * 7 * 8**3)
    assert by_label["muon"] == common + muon


def test_the_workload_is_llama() -> None:
    models = part("workload").MODELS
    sizes = {"60m": 58_073_600, "1b": 1_339_082_752, "7b": 6_738_415_616}
    assert {name: model.parameters() for name, model in models.items()} == sizes
    matrices = part("workload").made(models["60m"], "meta")
    assert sum(weight.numel() for weight in matrices.parameters()) == sizes["60m"]
    shapes = Counter(tuple(weight.shape) for weight in matrices.projected())
    assert shapes == models["60m"].shapes()
    assert {weight.dtype for weight in matrices.parameters()} == {torch.bfloat16}
    few = part("workload").made(models["60m"], "meta", ends=False, copies=2)
    assert Counter(tuple(weight.shape) for weight in few.parameters()) == dict.fromkeys(shapes, 2)


def test_refreshes_of_few_matrices_stand_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    refresh, workload = part("refresh"), part("workload")
    model = workload.SIZES["small"].models["60m"]
    matrices = workload.made(model, "cpu", ends=False, copies=1)
    fits = refresh.Fits(model, matrices, refresh.EIGH)
    fits.refit(context())
    seconds = {(96, 96): 1.0, (160, 96): 10.0, (96, 160): 100.0}
    fits._events = [
        refresh.RefreshEvent(1, None, shape, 16, spent, 1.0, None)
        for shape, spent in seconds.items()
    ]
    assert fits._whole() == 8 * 1.0 + 4 * 10.0 + 2 * 100.0


def test_a_basis_that_is_not_refitted_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    refresh, workload = part("refresh"), part("workload")
    model = workload.SIZES["tiny"].models["60m"]
    matrices = workload.made(model, "cpu", ends=False)
    fits = refresh.Fits(model, matrices, refresh.RANDOMIZED)
    matrices.projected()[0].grad = None
    with pytest.raises(RuntimeError, match="6 of 7 matrices were refitted"):
        fits.refit(context())


def test_the_best_share_is_that_of_the_singular_values() -> None:
    grad = torch.randn(12, 9, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(grad.double()).square()
    best = part("refresh").best_share(grad, 4)
    assert best == pytest.approx(float(values[:4].sum() / values.sum()))
    assert part("refresh").best_share(grad.mT, 4) == pytest.approx(best)


def test_svds_are_predicted_from_the_largest_that_is_known() -> None:
    predicted = part("refresh").predicted
    assert predicted((4, 6), {}) == 0.0
    assert predicted((8, 12), {"2x2": 9.0, "4x6": 1.0}) == pytest.approx(8.0)


def test_a_plain_llama_learns_and_has_the_names_of_the_real_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    llama = part("llama")
    model = part("workload").SIZES["tiny"].models["60m"]
    monkeypatch.setattr(llama.importlib.util, "find_spec", lambda name: None)
    torch.manual_seed(0)
    plain, kind = llama.llama(model, torch.device("cpu"), 16)
    assert "transformers is not installed" in kind
    names = {name for name, _ in plain.named_parameters()}
    assert "layers.0.self_attn.q_proj.weight" in names
    assert "layers.0.mlp.down_proj.weight" in names
    assert sum(weight.numel() for weight in plain.parameters()) == model.parameters()
    tokens = torch.randint(model.vocabulary, (1, 16))
    optimizer = build("galore_adamw", plain, lr=3e-2, rank=4, refresh="randomized")
    losses = []
    for _ in range(12):
        loss = plain(tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(math.log(model.vocabulary), rel=0.1)
    assert losses[-1] < 0.8 * losses[0]
    # No token sees what follows it.
    changed = tokens.clone()
    changed[0, -1] = (changed[0, -1] + 1) % model.vocabulary
    hidden = [plain.embed_tokens(t) for t in (tokens, changed)]
    turn = llama._rotation(16, plain.width, tokens.device)
    before, after = (plain.layers[0](x, turn) for x in hidden)
    assert torch.equal(before[:, :-1], after[:, :-1])
    assert not torch.equal(before[:, -1], after[:, -1])


def test_plain_llama_equals_transformers() -> None:
    pytest.importorskip("transformers")
    llama = part("llama")
    model = part("workload").SIZES["tiny"].models["60m"]
    torch.manual_seed(0)
    theirs, kind = llama.llama(model, torch.device("cpu"), 16)
    assert kind.startswith("transformers ")
    ours = llama.Plain(model)
    weights = {name.removeprefix("network."): w for name, w in theirs.state_dict().items()}
    ours.load_state_dict({name.removeprefix("model."): w for name, w in weights.items()})
    tokens = torch.randint(model.vocabulary, (2, 16))
    losses = [float(network.float()(tokens).detach()) for network in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_transformers_that_does_not_work_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    llama = part("llama")

    class Broken(nn.Module):
        def __init__(self, *given: Any) -> None:
            raise TypeError("another version")

    monkeypatch.setattr(llama.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(llama, "_Hugging", Broken)
    model = part("workload").SIZES["tiny"].models["60m"]
    found, kind = llama.llama(model, torch.device("cpu"), 16)
    assert isinstance(found, llama.Plain)
    assert "TypeError: another version" in kind
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.slow
def test_the_summary_of_a_real_section(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran("refresh", file)
    found = json.loads(file.read_text()) | {"file": file.name}
    summary = part("summary")
    status = summary.report(
        file.with_name("summary.json"), {"refresh": found}, chosen=["refresh"], seconds=1, cut=False
    )
    assert status == 0
    assert "correctness holds" in capsys.readouterr().out
