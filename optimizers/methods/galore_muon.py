"""Muon in GaLore's subspace: the projected momentum is orthogonalised.

With GaLore's P and R (`galore`) and Muon's momentum and Newton-Schulz iteration (`rules.muon`):

    M <- momentum M + (1 - momentum) R,    X = orthogonalize(M or its Nesterov look-ahead)
    W <- (1 - lr wd) W - lr s scale P X    (or X P^T)

X has r singular values near 1, so all r directions of the subspace take steps of equal size,
whatever their share of the gradient. Muon: Jordan et al., 2024; the projection: Zhao et al., arXiv
2403.03507. Memory per m x n matrix: min(m, n) r for P and max(m, n) r for M.
"""

from __future__ import annotations

from ..engine.method import method
from ..engine.optimizer import LowRankOptimizer
from ..engine.rule_families import MUON


@method("galore_muon", summary="Muon in GaLore's subspace, AdamW elsewhere", state="m r + n r")
class GaLoreMuon(LowRankOptimizer):
    """Muon on the projected gradient of groups with `rank`, AdamW on all other groups."""

    rule = MUON
