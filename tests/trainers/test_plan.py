"""Plans of memory: what they say, and what wrong use says."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from representative import with_representative

from lowrank.optimizers import available, build, expected_state_bytes, state_bytes
from lowrank.optimizers.engine import batching, scratch
from lowrank.trainers.cli import main
from lowrank.trainers.plan import Plan, card_bytes, measure, memory_bytes, plan, rank
from lowrank.trainers.plan import estimate as estimating
from lowrank.trainers.plan.network import Blocks, find_blocks


def write_config(folder: Path, **changes: Any) -> str:
    """The `config.json` of a tiny LLaMA; its path."""
    shape = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "dtype": "float32",
    }
    transformers.LlamaConfig(**(shape | changes)).save_pretrained(folder)
    return str(folder / "config.json")


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    return write_config(tmp_path)


def planned(model: str, optimizer: str = "galore_adamw", **arguments: Any) -> Plan:
    given = {"sequence": 32, "device": "cpu", "options": {"rank": 4}} | arguments
    return plan(model, optimizer, **given)


def test_weights_gradients_and_state_are_exact(tiny: str) -> None:
    config = transformers.AutoConfig.from_pretrained(tiny)
    model = transformers.LlamaForCausalLM(config)
    made = planned(tiny)
    weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    gradients = sum(param.nbytes for param in model.parameters())
    state = state_bytes(build("galore_adamw", model, rank=4))
    assert made.parameters == sum(param.numel() for param in model.parameters())
    assert made.phases["step"]["weights"] == weights
    assert made.phases["step"]["gradients"] == gradients
    assert made.state == state == expected_state_bytes("galore_adamw", model, rank=4)
    step = made.phases["step"]
    assert step["moments"] + step["bases"] + step["other state"] == state


@pytest.mark.slow
def test_measured_steps_take_what_was_planned(tiny: str) -> None:
    options = {"rank": 4, "update_proj_gap": 2, "lr": 1e-3}
    made = planned(tiny, options=options)
    found = measure(tiny, "galore_adamw", sequence=32, options=options)
    assert set(found.peaks) == {"forward", "backward", "step", "refresh"}
    for name, peak in found.peaks.items():
        assert made.peaks[name] == pytest.approx(peak, rel=0.05), name


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_passes_take_what_was_planned(tiny: str, accumulation: int, *, checkpointing: bool) -> None:
    kind: dict[str, Any] = {"accumulation": accumulation, "checkpointing": checkpointing}
    made = planned(tiny, "adamw", batch=3, options={}, **kind)
    found = measure(tiny, "adamw", sequence=32, batch=3, options={"lr": 1e-3}, **kind)
    for name, peak in found.peaks.items():
        assert made.peaks[name] == pytest.approx(peak, rel=0.05), name


@pytest.mark.parametrize(
    "optimizer", with_representative(("galore_adamw", "relora_adamw", "adamw"), ())
)
def test_few_blocks_stand_for_many(
    tmp_path: Path, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = write_config(tmp_path, num_hidden_layers=11)
    scaled = planned(deep, optimizer)
    blocks = find_blocks

    def unequal(model: Any) -> Blocks | None:
        found = blocks(model)
        return None if found is None else dataclasses.replace(found, equal=False)

    monkeypatch.setattr("lowrank.trainers.plan.fakes.find_blocks", unequal)
    whole = planned(deep, optimizer)
    assert scaled.phases == whole.phases
    assert scaled.parameters == whole.parameters


@pytest.mark.parametrize(
    "optimizer",
    with_representative(
        ("qgalore_adamw_8bit", "ldadam_adamw", "galore_muon", "sltrain_adamw", "adamw"),
        ("qgalore_adamw_8bit",),
    ),
)
def test_few_blocks_stand_for_many_where_batches_are_full(
    tmp_path: Path, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bounds so small show what batches of several shapes have that differs from their sizes."""
    monkeypatch.setattr(scratch, "DEVICE_SCRATCH_BYTES", 10_000)
    for module in (scratch, batching):
        monkeypatch.setattr(module, "SCRATCH_BYTES", 6_000)
    deep = write_config(tmp_path, num_hidden_layers=7)
    arguments: dict[str, Any] = {"device": "cuda", "options": {}}
    scaled = planned(deep, optimizer, **arguments)
    monkeypatch.setattr("lowrank.trainers.plan.estimate.DEPTHS", (7, 7))
    whole = planned(deep, optimizer, **arguments)
    assert scaled.phases["forward"] == whole.phases["forward"]
    for name in ("step", "refresh"):
        assert scaled.peaks[name] == pytest.approx(whole.peaks[name], rel=0.03), name


def test_options_without_effect_are_said(tiny: str) -> None:
    assert not planned(tiny).notes
    made = planned(tiny, "adamw", options={"rank": 4})
    assert made.notes == ("rank=4 has no effect on adamw",)


@pytest.mark.slow
def test_large_batches_follow_from_small_ones(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimating, "chunk_tokens", lambda vocabulary: 1)
    far = planned(tiny, batch=20)
    monkeypatch.undo()
    assert far.peaks == planned(tiny, batch=20).peaks


@pytest.mark.slow
def test_the_largest_batch_is_the_last_that_fits(tiny: str) -> None:
    made = planned(tiny, memory="4MB")
    assert made.fits == "yes"
    largest = made.largest_batch
    assert largest is not None
    assert planned(tiny, memory="4MB", batch=largest).fits == "yes"
    assert planned(tiny, memory="4MB", batch=largest + 1).fits == "no"
    assert made.tokens_per_step == 32


def test_too_little_memory(tiny: str) -> None:
    made = planned(tiny, memory="1KB")
    assert made.fits == "no"
    assert made.largest_batch == 0


@pytest.mark.slow
def test_a_gpu_has_slack_and_its_allocator_rounds_up(tiny: str) -> None:
    made = planned(tiny, device="cuda", memory="1.2GB")
    assert made.fits == "yes"
    assert planned(tiny, device="cuda", memory="600MB").fits == "barely"
    assert 0 < made.slack.low < made.slack.high
    assert made.peak >= planned(tiny).peak


@pytest.mark.slow
def test_gradients_are_freed_in_the_backward_pass(tiny: str) -> None:
    options = {"rank": 4, "update_proj_gap": 2, "lr": 1e-3}
    ordinary = planned(tiny, options=options)
    early = planned(tiny, options=options, update_in_backward=True)
    # That of the smallest parameter waits for the step, which looks whether it was changed.
    waiting = early.phases["step"]["gradients"]
    assert 0 < waiting < 0.02 * ordinary.phases["step"]["gradients"]
    found = measure(tiny, "galore_adamw", sequence=32, options=options, update_in_backward=True)
    assert found.gradients == waiting
    for name, peak in found.peaks.items():
        assert early.peaks[name] == pytest.approx(peak, rel=0.05), name
    assert early.peak < ordinary.peak


def test_what_updates_in_backward_keep_between_micro_batches(tiny: str) -> None:
    setting: dict[str, Any] = {"update_in_backward": True, "accumulation": 2}
    ordinary = planned(tiny, accumulation=2)
    early = planned(tiny, **setting)
    whole = early.phases["forward"]["gradients"]
    assert whole == ordinary.phases["forward"]["gradients"]  # as the first step refits all bases
    assert early.phases["step"]["gradients"] < 0.02 * whole
    assert early.between_refits is not None
    assert early.between_refits < early.peak
    assert planned(tiny, update_in_backward=True).between_refits is None
    assert planned(tiny, "apollo_adamw", **setting).between_refits is None
    first = planned(tiny, refit="first", **setting)
    assert first.between_refits is None
    assert early.between_refits <= first.peak < early.peak
    assert not any("kept whole" in note for note in first.notes)
    assert any("kept whole" in note for note in early.notes)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["galore_adamw", "loqt_adamw"])
def test_few_blocks_stand_for_many_between_micro_batches(tmp_path: Path, optimizer: str) -> None:
    setting: dict[str, Any] = {"update_in_backward": True, "accumulation": 3}
    four, five, seven = (
        planned(write_config(tmp_path, num_hidden_layers=depth), optimizer, **setting)
        for depth in (4, 5, 7)
    )
    for name, peak in five.peaks.items():
        each = peak - four.peaks[name]
        assert seven.peaks[name] == peak + 2 * each, name


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_several_processes(tiny: str, strategy: str) -> None:
    alone, several = planned(tiny), planned(tiny, world=4, strategy=strategy)
    assert several.tokens_per_step == 4 * alone.tokens_per_step
    assert several.wire is not None
    gradients = alone.phases["step"]["gradients"]
    if strategy == "ddp":
        assert several.wire == {"passes": gradients, "optimizer": 0}
        assert several.phases["forward"]["gradients"] == gradients
    else:
        assert several.phases["step"]["gradients"] * 4 == gradients
        assert several.state < alone.state
        assert several.phases["forward"]["gathered"] > 0
        assert several.wire["passes"] == gradients + 2 * gradients // 4


@pytest.mark.exhaustive
def test_all_methods_are_ranked(tiny: str, tmp_path: Path, capsys: Any) -> None:
    plot = tmp_path / "methods.png"
    arguments = ["plan", "--model", tiny, "--all", "--sequence=16", "--option=rank=4"]
    assert main([*arguments, "--device=cpu", "--memory=1GB", f"--plot={plot}"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert sorted(line.split()[0] for line in lines) == available()
    peaks = [float(line.split()[1]) for line in lines]
    assert peaks == sorted(peaks)
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_numbers_for_programs(tiny: str, capsys: Any) -> None:
    assert main(["plan", "--model", tiny, "--sequence=16", "--device=cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["optimizer"] == "galore_adamw"
    assert found["peak"] == max(sum(parts.values()) for parts in found["phases"].values())


@pytest.mark.slow
def test_measured_beside_planned(tiny: str, capsys: Any) -> None:
    arguments = ["plan", "--model", tiny, "--sequence=16", "--device=cpu", "--measure"]
    assert main([*arguments, "--option=update_proj_gap=2", "--option=rank=4"]) == 0
    text = capsys.readouterr().out
    assert "exact" in text
    assert "measured GB" in text


@pytest.mark.slow
def test_all_methods_measured(tiny: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("lowrank.trainers.plan.planner.available", lambda: ["adamw", "muon"])
    arguments = ["plan", "--model", tiny, "--sequence=16", "--device=cpu", "--all", "--measure"]
    assert main(arguments) == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    assert {row.split("`")[1] for row in rows} == {"adamw", "muon"}
    assert all("| exact |" in row for row in rows)


def test_planning_changes_no_random_numbers(tiny: str) -> None:
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    planned(tiny)
    assert torch.equal(torch.rand(3), wanted)


def test_cards_and_sizes() -> None:
    assert card_bytes("RTX 4090") == card_bytes("4090") == 24564 << 20
    assert card_bytes("a100 40gb") == 40960 << 20
    assert memory_bytes("16GB") == 16 * 10**9
    assert memory_bytes("1.5 GiB") == 3 << 29
    assert memory_bytes(123_456_789) == 123_456_789


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--card=A100"], "card='A100' comes as A100-40GB, A100-80GB"),
        (["--card=4099"], "card='4099' is not known; did you mean '4090'?"),
        (["--memory=lots"], "memory='lots': accepted are sizes such as 16GB"),
        (["--memory=24"], "memory='24' has no unit"),
        (["--memory=0GB"], "memory='0GB': accepted are sizes above 0"),
        (["--optimizer=galore_adam"], "unknown optimizer 'galore_adam'; did you mean"),
        (["--model=llama_8b"], "model='llama_8b': did you mean 'llama_7b'?"),
        (["--model=nowhere/config.json"], "there is no file nowhere/config.json"),
        (["--world=2"], "world=2 with strategy=None"),
        (["--strategy=fsdp2"], "world=1 with strategy='fsdp2'"),
        (["--world=2", "--strategy=zero"], "strategy='zero': accepted are 'ddp', 'fsdp2'"),
        (["--sequence=0"], "sequence=0: accepted is an integer of at least 1"),
        (["--device=gpu"], "device='gpu': accepted are 'cuda', 'cpu'"),
        (["--dtype=float8"], "dtype='float8': accepted are float32, bfloat16"),
        (["--autocast", "--dtype=bfloat16"], "autocast=True with dtype='bfloat16': accepted is"),
        (["--weight-bits=5"], "weight_bits=5: accepted are 16, 8, 4"),
        (["--option=rank"], "--option 'rank': accepted is KEY=VALUE"),
        (["--option=rnk=3"], "unknown option of galore_adamw 'rnk'; did you mean 'rank'?"),
        (["--option=rank=0"], "rank=0"),
        (["--option=rank=5000"], "rank=5000"),
        (["--plot=x.png"], "--plot x.png: accepted with --all"),
        (["--all", "--plot=x.gif"], "accepted are files that end in .png"),
        (["--all", "--option=rnk=3"], "option 'rnk': no optimizer has it"),
    ],
)
def test_wrong_use_is_one_line(arguments: list[str], message: str, capsys: Any) -> None:
    assert main(["plan", "--sequence=64", *arguments]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.count("\n") == 1
    assert not said.out


def test_sequences_beyond_the_model(tiny: str, capsys: Any) -> None:
    assert main(["plan", "--model", tiny, "--sequence=65"]) == 2
    assert "at most 64 tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"model_type": "bert"', "is no configuration"),
        ('{"model_type": "nothing"}', "is no configuration"),
        ('{"model_type": "clip_vision_model"}', "is not that of a causal language model"),
    ],
)
def test_other_configurations(tmp_path: Path, content: str, message: str, capsys: Any) -> None:
    file = tmp_path / "config.json"
    file.write_text(content)
    assert main(["plan", "--model", str(file)]) == 2
    assert message in capsys.readouterr().err


def test_other_models(tmp_path: Path) -> None:
    transformers.GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=64, n_positions=32)\
        .save_pretrained(tmp_path)  # fmt: skip
    made = plan(str(tmp_path), "adamw", sequence=16, device="cpu")
    model = transformers.GPT2LMHeadModel(transformers.AutoConfig.from_pretrained(tmp_path))
    assert made.parameters == sum(param.numel() for param in model.parameters())
    assert all(math.isfinite(peak) and peak > 0 for peak in made.peaks.values())


@pytest.mark.slow
def test_rank_leaves_out_options_that_a_method_lacks(
    tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowrank.trainers.plan.planner.available", lambda: ["adamw", "coap_adamw"])
    plans = rank(tiny, sequence=16, device="cpu", options={"rank": 4, "reproject_factor": 3})
    assert {made.optimizer for made in plans} == {"adamw", "coap_adamw"}


def test_options_without_effect_are_told(tiny: str) -> None:
    made = planned(tiny, "adamw", options={"rank": 4, "betas": (0.9, 0.99)})
    assert "rank=4 has no effect on adamw" in made.notes
    assert not any("betas" in note for note in made.notes)
