"""Predicted bytes against those of real steps, on the CPU."""

from typing import Any

import pytest
from representative import with_representative

from lowrank.optimizers import available
from lowrank.trainers.plan import measure, plan
from lowrank.trainers.plan.options import method_options

#: A later refresh is among three steps.
CHANGES = {"update_proj_gap": 2}


def compare(model: str, optimizer: str, **setting: Any) -> None:
    options = method_options(model, optimizer, CHANGES, None)
    made = plan(model, optimizer, device="cpu", options=options, **setting)
    found = measure(model, optimizer, options=options, **setting)
    step = made.phases["step"]
    assert step["weights"] == found.weights
    assert step["gradients"] == found.gradients
    assert made.state == found.state
    for name, peak in found.peaks.items():
        assert made.peaks[name] == pytest.approx(peak, rel=0.05), name
    assert made.peak == pytest.approx(found.peak, rel=0.05)


#: One of each kind of state, update and layer.
REPRESENTATIVE = ("adamw", "adamw_8bit", "galore_adamw", "qgalore_adamw_8bit", "sltrain_adamw")


@pytest.mark.parametrize("optimizer", with_representative(available(), REPRESENTATIVE))
def test_predicted_is_measured(optimizer: str) -> None:
    compare("llama_9m", optimizer, sequence=64)


@pytest.mark.exhaustive
@pytest.mark.parametrize("optimizer", ["galore_adamw", "apollo_mini_adamw", "qgalore_adamw_8bit"])
def test_predicted_is_measured_of_a_larger_model(optimizer: str) -> None:
    compare("llama_60m", optimizer, sequence=64)
