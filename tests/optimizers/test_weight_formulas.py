"""Weight bytes of converted models at the papers' five sizes equal the formulas, in bf16.

With k = min(m, n), r the rank, nnz = int(0.03 m n) and b = 2 bytes an entry, a matrix holds

    plain factors  b r (m + n)             SLTrain     b (r (m + n) + nnz), support from a seed
    ReLoRA         b (m n + r (m + n))     SwitchLoRA  b (m n + (r + k) (m + n)) and indices
    SST            b k (m + n + 1)

and everything else b an entry.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from table import each_size
from test_state_formulas import SIZES, B, Counts, model_of

from lowrank.optimizers import build
from lowrank.optimizers.layers.convert import factored_layers

FORMULAS: dict[str, Callable[[int, int, int], int]] = {
    "low_rank_adamw": lambda m, n, r: r * (m + n),
    "relora_adamw": lambda m, n, r: m * n + r * (m + n),
    "switchlora_adamw": lambda m, n, r: m * n + (r + min(m, n)) * (m + n),
    "sltrain_adamw": lambda m, n, r: r * (m + n) + int(0.03 * m * n),
    # a factor, and a scale for 64 entries of weight and basis
    "loqt_adamw": lambda m, n, r: r * max(m, n) + (m * n + r * min(m, n)) // 64,
    "sst_adamw": lambda m, n, r: min(m, n) * (m + n + 1),
}
# SwitchLoRA's chosen candidates; the seed that SLTrain's support is regenerated from; NF4.
CODES: dict[str, Callable[[int, int, int], int]] = {
    "switchlora_adamw": lambda m, n, r: 2 * r,
    "sltrain_adamw": lambda m, n, r: 1,
    "loqt_adamw": lambda m, n, r: (m * n + r * min(m, n)) // 2,
}
OPTIONS = {"low_rank_adamw": {"alpha": 32.0}, "relora_adamw": {"alpha": 32.0}}


@each_size(SIZES)
@pytest.mark.parametrize("name", FORMULAS)
def test_weight_bytes(name: str, size: str) -> None:
    counts, model = Counts(size), model_of(size)
    build(name, model, lr=1e-3, rank=counts.rank, **OPTIONS.get(name, {}))
    layers = [layer for _, layer in factored_layers(model)]
    host = [getattr(layer, name) for layer in layers for name in layer.host_tensors()]
    tensors = [*model.parameters(), *model.buffers(), *host]
    found = sum(t.nbytes for t in tensors if t.is_floating_point())
    formula = FORMULAS[name]
    entries = sum(formula(m, n, counts.rank) for m, n in counts.matrices) + sum(counts.others)
    assert found == B * entries
    codes = sum(t.numel() for t in tensors if not t.is_floating_point())
    own = CODES.get(name, lambda m, n, r: 0)
    assert codes == sum(own(m, n, counts.rank) for m, n in counts.matrices)
