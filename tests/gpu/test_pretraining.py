"""gpu-check: the pretraining of a 7B model, at a tiny size on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from stand_ins import part, ran


@pytest.mark.slow
def test_pretraining_is_measured_or_says_what_is_missing(file: Path) -> None:
    record = ran("memory", file)
    for trial in part("pretraining").TRIALS:
        rows = [row for row in record.rows if row.name == f"pretraining, {trial.label}: peak"]
        skipped = [entry for entry in record.skipped if entry["what"].endswith(trial.label)]
        lacking = part("pretraining").missing(trial)
        if lacking is None:
            assert len(rows) == 1
            assert set(rows[0].details["peaks"]) >= {"forward", "backward", "step"}
            assert rows[0].details["planned"].keys() >= rows[0].details["peaks"].keys()
        else:
            assert [entry["why"] for entry in skipped] == [lacking]
