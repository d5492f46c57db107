"""FSDP2 with every method and many options, whatever the number of ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
from fsdp2_runs import ALL, CORE, Case, check, follow, limit
from sharded import run

VARIANTS: list[Case] = [
    *(
        (name, {"proj_type": side})
        for name in ("galore_adamw", "fira_adamw", "galore_adafactor", "frugal_adamw")
        for side in ("left", "right")
    ),
    *(("galore_adamw", {"refresh": mode}) for mode in ("randomized", "warm")),
    # Signs of a decomposition of the whole matrix can't be known: compared up to the first refresh.
    ("galore_adamw", {"refresh": "svd", "update_proj_gap": 40}),
    # Not "restore", nor rounded bases: they magnify the last bits, on one process too.
    *(("galore_adamw", {"moments": how}) for how in ("reset", "rotate")),
    ("galore_adamw", {"stagger": True}),
    ("galore_adamw", {"proj_type": "full"}),
    ("apollo_adamw", {"scale_type": "tensor", "proj_type": "full"}),
    ("galore_adafactor", {"beta1": 0.9, "moments": "restore"}),
    ("adafactor", {"beta1": 0.9, "scale_parameter": True}),
    ("coap_adafactor_8bit", {"plain_rule": "adamw_8bit", "min_8bit_size": 64}),
]


@pytest.mark.parametrize(
    ("cases", "steps"),
    [
        pytest.param(
            [case for case in ALL if case[0] in CORE], 16, marks=pytest.mark.slow, id="core"
        ),
        pytest.param(ALL, 30, marks=pytest.mark.exhaustive, id="all"),
    ],
)
def test_optimizers_on_two_to_four_ranks(tmp_path: Path, cases: list[Case], steps: int) -> None:
    """Up to five refreshes, with clipping and accumulation; parts are uneven, some empty."""
    sizes = [2, 3, 4]
    made = run(follow, 4, tmp_path, cases, sizes, steps)
    far = {k: gap for k, gap in check(made, cases, sizes).items() if not gap <= limit(k)}
    assert not far


@pytest.mark.exhaustive
def test_options_on_three_ranks(tmp_path: Path) -> None:
    made = run(follow, 3, tmp_path, VARIANTS, [3], 16)
    far = {k: gap for k, gap in check(made, VARIANTS, [3]).items() if not gap <= limit(k)}
    assert not far
