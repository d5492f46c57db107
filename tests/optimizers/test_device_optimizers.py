"""Optimizers on a GPU: kernels beside pure torch, and steps as CUDA graphs.

`./scripts/gpu-check` runs the same cases without pytest; `test_kernels.py` has those on the host.
"""

import device_optimizer_cases as cases
import pytest
import torch

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_holds(case: cases.Case) -> None:
    case.holds(torch.device("cuda"))
