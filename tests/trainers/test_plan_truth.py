"""Predicted bytes against those of real steps, on the CPU."""

from pathlib import Path
from typing import Any

import pytest
import transformers
from representative import with_representative

from lowrank.optimizers import available
from lowrank.trainers.plan import measure, plan
from lowrank.trainers.plan.ledger import Ledger
from lowrank.trainers.plan.options import known, method_options


def compare(
    model: str, optimizer: str, rank: int | None = None, bits: int | None = None, **setting: Any
) -> None:
    """A later refresh is among the three steps that are measured."""
    changes = {"update_proj_gap": 2} | ({} if rank is None else {"rank": rank})
    changes = {name: value for name, value in changes.items() if known(optimizer, name)}
    options = method_options(model, optimizer, changes, bits)
    made = plan(model, optimizer, device="cpu", options=options, **setting)
    found = measure(model, optimizer, options=options, **setting)
    step = made.phases["step"]
    assert step["weights"] == found.weights
    assert max(step["gradients"], made.phases["refresh"]["gradients"]) == found.gradients
    assert made.state == found.state
    for name, peak in found.peaks.items():
        assert made.peaks[name] == pytest.approx(peak, rel=0.05), name
    assert made.peak == pytest.approx(found.peak, rel=0.05)


#: One of each kind of state and layer; of plain ones test_plan.py has smaller models.
REPRESENTATIVE = ("galore_adamw", "qgalore_adamw_8bit", "sltrain_adamw")


@pytest.mark.parametrize("optimizer", with_representative(available(), REPRESENTATIVE[1:]))
def test_predicted_is_measured(optimizer: str) -> None:
    compare("llama_9m", optimizer, sequence=64)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The configuration of 1M parameters, of which matrices make out more than activations."""
    folder = tmp_path_factory.mktemp("small")
    shape = {"hidden_size": 192, "intermediate_size": 512, "num_attention_heads": 4}
    config = transformers.LlamaConfig(
        **shape, vocab_size=256, num_hidden_layers=2, max_position_embeddings=64, dtype="float32"
    )
    config.save_pretrained(folder)
    return str(Path(folder) / "config.json")


@pytest.mark.parametrize(
    "optimizer", with_representative(available(), (REPRESENTATIVE[0], "loqt_adamw"))
)
def test_predicted_is_measured_with_updates_in_backward(small: str, optimizer: str) -> None:
    rank = None if optimizer == "apollo_mini_adamw" else 24
    compare(small, optimizer, rank, sequence=32, update_in_backward=True)


@pytest.mark.parametrize("optimizer", with_representative(available(), ("galore_adamw",)))
def test_predicted_is_measured_with_several_micro_batches(small: str, optimizer: str) -> None:
    rank = None if optimizer == "apollo_mini_adamw" else 24
    compare(small, optimizer, rank, sequence=32, update_in_backward=True, accumulation=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "bits", "checkpointing"),
    [
        ("galore_adamw", 4, False),
        ("apollo_mini_adamw", 8, True),
        ("loqt_adamw", None, True),
        ("muon", None, True),
    ],
)
def test_predicted_is_measured_between_micro_batches(
    small: str, optimizer: str, bits: int | None, *, checkpointing: bool
) -> None:
    """The second of three is neither the first, which finds nothing kept, nor the last."""
    rank = None if optimizer == "apollo_mini_adamw" else 24
    setting: dict[str, Any] = {"sequence": 32, "checkpointing": checkpointing}
    compare(small, optimizer, rank, bits, update_in_backward=True, accumulation=3, **setting)


@pytest.mark.parametrize(
    "optimizer",
    with_representative(
        ("galore_adamw", "galore_plus_adamw", "qgalore_adamw_8bit"), ("galore_adamw",)
    ),
)
def test_steps_without_refits_keep_projections(small: str, optimizer: str) -> None:
    bits = 4 if optimizer == "qgalore_adamw_8bit" else None
    options = method_options(small, optimizer, {"update_proj_gap": 100, "rank": 24}, bits)
    setting: dict[str, Any] = {"sequence": 32, "update_in_backward": True, "accumulation": 3}
    made = plan(small, optimizer, device="cpu", options=options, **setting)
    found = measure(small, optimizer, options=options, steps=1, skipped=1, **setting)
    assert made.between_refits == pytest.approx(found.peak, rel=0.05)
    assert found.peak < 0.8 * made.peak


@pytest.mark.parametrize(
    ("optimizer", "bits"),
    [
        ("galore_adamw", 4),
        pytest.param("loqt_adamw", None, marks=pytest.mark.slow),
        pytest.param("qgalore_adamw_8bit", None, marks=pytest.mark.slow),
    ],
)
def test_predicted_is_measured_where_gradients_wait_for_the_step(
    small: str, optimizer: str, bits: int | None
) -> None:
    """Those of quantised weights are dense; LoQT's layers keep more than gradients."""
    compare(small, optimizer, 24, bits, sequence=32, accumulation=2)


@pytest.mark.parametrize(
    ("optimizer", "bits", "accumulation"),
    [
        ("galore_adamw", None, 3),
        pytest.param("coap_adamw", None, 2, marks=pytest.mark.slow),
        pytest.param("qgalore_adamw_8bit", 4, 2, marks=pytest.mark.slow),
        pytest.param("fira_adamw", None, 2, marks=pytest.mark.slow),
    ],
)
def test_predicted_is_measured_with_refits_by_the_first_micro_batch(
    small: str, optimizer: str, bits: int | None, accumulation: int
) -> None:
    setting: dict[str, Any] = {"update_in_backward": True, "accumulation": accumulation}
    compare(small, optimizer, 24, bits, sequence=32, refit="first", **setting)


@pytest.mark.exhaustive
@pytest.mark.parametrize("optimizer", ["galore_adamw", "apollo_mini_adamw", "qgalore_adamw_8bit"])
@pytest.mark.parametrize("early", [False, True])
def test_predicted_is_measured_of_a_larger_model(optimizer: str, *, early: bool) -> None:
    compare("llama_60m", optimizer, sequence=64, update_in_backward=early)


@pytest.mark.slow
def test_planning_of_a_large_model_simulates_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operations on fake tensors are what planning takes its time for."""
    count = 0
    run = Ledger.__torch_dispatch__

    def counted(ledger: Ledger, *arguments: Any) -> Any:
        nonlocal count
        count += 1
        return run(ledger, *arguments)

    monkeypatch.setattr(Ledger, "__torch_dispatch__", counted)
    plan("llama_7b", "apollo_mini_adamw", weight_bits=4, update_in_backward=True)
    assert 0 < count < 25_000
