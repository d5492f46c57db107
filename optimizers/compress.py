"""WeLore: a trained model's matrices cut to ranks that their own spectra choose.

Jaiswal et al., "From Low Rank Gradient Subspace Stabilization to Low-Rank Weights: Observations,
Theories, and Applications" (arXiv 2407.11239, WeLore). With s_1 >= s_2 >= ... the singular values
of a matrix, one threshold k for all of them keeps the values with s_i / s_1 >= k, so that ranks
fall most where spectra are steep. A matrix that loses at least half of its rank is low-rank and
becomes two factors,

    W ~ B A,    B = U sqrt(S),    A = sqrt(S) V^T     (`LowRankLinear` with c = 1)

The others stay dense. Fine-tuning then trains the factors alone, `build("low_rank_adamw", model)`.

By the released code, which finds k by steps of a search; here it is exact: values are sorted, and
the budget is met by the least threshold that meets it. Budgets are ours to choose from: `reduction`
(the paper's: a share of all ranks, counted before the split into low-rank and dense) or `entries`
(what is left of the matrices' entries, after it).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .coverage import warn_of_left_out
from .engine import checks
from .engine.chunks import wide_dtype
from .layers import FactoredLinear, LowRankLinear
from .layers.base import FACTOR
from .layers.convert import _irreplaceable, check_not_wrapped, replace_modules
from .layers.replicas import mark_frozen
from .layers.seeds import named_layers
from .param_groups import projected_layers
from .pretrained import save_dense_weights
from .targets import Patterns
from .weights.quantized import QuantizedWeight

#: Share of its rank that a matrix must lose to count as low-rank, unless given.
LOW_RANK = 0.5


@dataclass(frozen=True)
class CompressedMatrix:
    """What became of a matrix.

    Attributes:
        name: its layer's.
        rows: m.
        columns: n.
        rank: number of singular values that reach the threshold.
        low_rank: whether it is two factors of that rank now; else it is dense, as it was.
        error: relative error of the factors, ||W - B A|| / ||W||; 0 for a dense one.
        half: number of singular values that hold half of ||W||^2: small for a steep spectrum.
    """

    name: str
    rows: int
    columns: int
    rank: int
    low_rank: bool
    error: float
    half: int

    @property
    def entries(self) -> int:
        """Entries of its factors, or of itself."""
        factors = self.rank * (self.rows + self.columns)
        return factors if self.low_rank else self.rows * self.columns


@dataclass(frozen=True)
class WeightCompression:
    """What a compression did.

    Attributes:
        threshold: k.
        matrices: in the model's order.
    """

    threshold: float
    matrices: tuple[CompressedMatrix, ...]

    @property
    def reduction(self) -> float:
        """Share of all ranks below the threshold, low-rank or not."""
        whole = sum(min(own.rows, own.columns) for own in self.matrices)
        return 1.0 - sum(own.rank for own in self.matrices) / whole

    @property
    def entries(self) -> float:
        """What is left of the matrices' entries, as a share."""
        whole = sum(own.rows * own.columns for own in self.matrices)
        return sum(own.entries for own in self.matrices) / whole

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        shares = {"reduction": self.reduction, "entries": self.entries}
        return {
            "threshold": self.threshold,
            **shares,
            "matrices": [asdict(own) for own in self.matrices],
        }


@torch.no_grad()
def compress_weights(
    model: nn.Module,
    *,
    reduction: float | None = None,
    entries: float | None = None,
    low_rank: float = LOW_RANK,
    patterns: Patterns = None,
    freeze: bool = True,
) -> WeightCompression:
    """In place: replaces linear layers that their spectra show to be low-rank by two factors.

    Args:
        model: a dense model, before it is wrapped.
        reduction: share of all ranks to take away, in (0, 1); or
        entries: largest share of the matrices' entries to keep, in (0, 1).
        low_rank: least share of its rank that a low-rank matrix loses; and factors are never more
            entries than the matrix.
        patterns: which matrices, as in `param_groups`.
        freeze: leave only factors with `requires_grad`, for fine-tuning.

    Raises:
        ValueError: not one of the two budgets is given, it can't be met, an option is out of range,
            or the model isn't dense, or wrapped; the model is unchanged then.
    """
    if (reduction is None) == (entries is None):
        raise ValueError(
            f"reduction={reduction!r} with entries={entries!r}: accepted is one of them, a number "
            "between 0 and 1"
        )
    for name, value in (("reduction", reduction), ("entries", entries)):
        if value is not None:
            checks.number(name, value, low=0.0, high=1.0, low_open=True, high_open=True)
    checks.number("low_rank", low_rank, low=0.0, high=1.0, high_open=True)
    layers = _dense_layers(model, patterns)
    spectra = {name: _spectrum(name, layer.weight) for name, layer in layers.items()}
    threshold = _threshold(layers, spectra, reduction, entries, low_rank)
    found = {
        name: _decide(name, layers[name], spectra[name], threshold, low_rank) for name in layers
    }
    if not any(own.low_rank for own in found.values()):
        steepest = min(found.values(), key=lambda own: own.rank / min(own.rows, own.columns))
        raise ValueError(
            f"at threshold {threshold:.3g} no matrix loses {low_rank:.0%} of its rank; "
            f"{steepest.name} is nearest, with {steepest.rank} of "
            f"{min(steepest.rows, steepest.columns)}: accepted is a larger reduction (or fewer "
            "entries), or a smaller low_rank"
        )
    made = {layers[n]: _factored(layers[n], own.rank) for n, own in found.items() if own.low_rank}
    _put(model, made)
    if freeze:
        _freeze(model)
    return WeightCompression(threshold, tuple(found.values()))


def load_compressed(
    model: nn.Module, state: Mapping[str, Tensor], *, freeze: bool = True
) -> nn.Module:
    """In place: gives a dense model the factored layers of a compressed one's state dict, loads it.

    Args:
        model: a dense model of the same shape.
        state: the state dict; ranks are those of its factors.
        freeze: as in `compress_weights`.

    Raises:
        ValueError: it has no factors, or factors of no linear layer of this model.
        RuntimeError: it doesn't fit.
    """
    check_not_wrapped(model)
    ranks = {
        name.removesuffix(".lora_a"): len(value)
        for name, value in state.items()
        if name.endswith(".lora_a")
    }
    if not ranks:
        raise ValueError("the state has no factors (lora_a): accepted is a compressed model's")
    layers = {n: m for n, m in named_layers(model) if type(m) is nn.Linear}
    for name in ranks:
        if name not in layers:
            raise ValueError(
                f"the state has factors of {name}, which is no linear layer of this "
                f"{type(model).__name__}: accepted is a dense model of the compressed one's shape"
            )
    _put(model, {layers[n]: _layer(layers[n], rank) for n, rank in ranks.items()})
    model.load_state_dict(dict(state))
    if freeze:
        _freeze(model)
    return model


def _dense_layers(model: nn.Module, patterns: Patterns) -> dict[str, nn.Linear]:
    check_not_wrapped(model)
    for name, module in model.named_modules():
        quantised = isinstance(getattr(module, "weight", None), QuantizedWeight)
        if isinstance(module, FactoredLinear) or quantised:
            raise ValueError(
                f"{name} is a {type(module).__name__} with {'codes' if quantised else 'factors'}: "
                "accepted is a dense model (merge(model) makes one)"
            )
    names = {module: name for name, module in named_layers(model)}
    reasons = _irreplaceable(model)
    targets = [layer for layer in projected_layers(model, patterns) if layer not in reasons]
    warn_of_left_out(model, [f"{names[layer]}.weight" for layer in targets], "in layers replaced")
    return {names[layer]: layer for layer in targets}


def _spectrum(name: str, weight: Tensor) -> Tensor:
    """Singular values, descending, on the CPU in fp64."""
    values: Tensor = torch.linalg.svdvals(weight.detach().to(wide_dtype(weight))).double().cpu()
    if not bool(values.isfinite().all()) or not bool(values[0] > 0):
        raise ValueError(f"{name}.weight is zero or not finite: accepted are trained weights")
    return values


def _threshold(
    layers: Mapping[str, nn.Linear],
    spectra: Mapping[str, Tensor],
    reduction: float | None,
    entries: float | None,
    low_rank: float,
) -> float:
    """The least threshold that meets the budget: one of the values s_i / s_1, or 0."""
    shares = torch.cat([values / values[0] for values in spectra.values()]).sort().values
    if reduction is not None:
        # Values below the threshold are dropped; the first of each matrix is 1 and stays.
        dropped = round(reduction * len(shares))
        if dropped > len(shares) - len(spectra):
            raise ValueError(
                f"reduction={reduction!r} of {len(shares)} ranks leaves less than one for each of "
                f"{len(spectra)} matrices: accepted is at most {1 - len(spectra) / len(shares):.4g}"
            )
        return float(shares[dropped]) if dropped else 0.0
    assert entries is not None
    whole = sum(layer.weight.numel() for layer in layers.values())

    def left(threshold: float) -> int:
        return sum(
            _decide(name, layers[name], spectra[name], threshold, low_rank).entries
            for name in layers
        )

    candidates = sorted({*shares.tolist()})
    if left(candidates[-1]) > entries * whole:
        raise ValueError(
            f"entries={entries!r}: accepted is at least {left(candidates[-1]) / whole:.4g}, which "
            "is rank 1 everywhere"
        )
    low, high = 0, len(candidates) - 1  # `left` falls as the threshold rises
    while low < high:
        middle = (low + high) // 2
        low, high = (
            (low, middle) if left(candidates[middle]) <= entries * whole else (middle + 1, high)
        )
    return float(candidates[low])


def _decide(
    name: str, layer: nn.Linear, values: Tensor, threshold: float, low_rank: float
) -> CompressedMatrix:
    rows, columns = layer.weight.shape
    rank = int((values / values[0] >= threshold).sum())
    lost = 1 - rank / len(values)
    smaller = rank * (rows + columns) < rows * columns
    factored = lost >= low_rank and smaller
    squares = values.square()
    total = squares.sum()
    error = float((squares[rank:].sum() / total).sqrt()) if factored else 0.0
    half = int((squares.cumsum(0) < total / 2).sum()) + 1
    return CompressedMatrix(name, rows, columns, rank, factored, error, half)


def _layer(linear: nn.Linear, rank: int) -> LowRankLinear:
    return LowRankLinear(linear, 0, rank=rank, alpha=float(rank), keep_frozen=False)


def _factored(linear: nn.Linear, rank: int) -> LowRankLinear:
    weight = linear.weight.detach()
    u, s, vh = torch.linalg.svd(weight.to(wide_dtype(weight)), full_matrices=False)
    root = s[:rank].sqrt()
    made = _layer(linear, rank)
    made.lora_b.copy_(u[:, :rank] * root)
    made.lora_a.copy_(root.unsqueeze(1) * vh[:rank])
    return made


def _put(model: nn.Module, made: Mapping[nn.Linear, LowRankLinear]) -> None:
    replace_modules(model, {layer: factored for layer, factored in made.items()})
    for layer in made.values():
        for factor in layer.FACTORS:
            vars(getattr(layer, factor))[FACTOR] = True
    mark_frozen(model)
    save_dense_weights(model)


def _freeze(model: nn.Module) -> None:
    factors = {
        param
        for module in model.modules()
        if isinstance(module, LowRankLinear)
        for param in (module.lora_a, module.lora_b)
    }
    for param in model.parameters():
        param.requires_grad_(param in factors)
