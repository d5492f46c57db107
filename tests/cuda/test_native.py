"""The compiled kernels equal the references in plain torch, and what fp64 says.

Each test runs on the host's library and on the device's kernels in a simulator; on a GPU
`test_device.py` repeats them with the device's own library.
"""

import os
from collections.abc import Callable

import exact_cases
import kernel_cases as cases
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("native")

# A simulated launch takes milliseconds; the fixture may be shared between examples.
examples = settings(
    max_examples=int(os.environ.get("LOWRANK_TEST_EXAMPLES", "8")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.mark.parametrize(
    "case",
    [*cases.CASES, *exact_cases.CASES],
    ids=lambda case: f"{case.__module__}-{case.__name__}",
)
def test_equals_the_reference(case: Callable[[cases.Draw], None]) -> None:
    @examples
    @given(data=st.data())
    def run(data: st.DataObject) -> None:
        case(cases.Draw(data.draw, torch.device("cpu")))

    run()
