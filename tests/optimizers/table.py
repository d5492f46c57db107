"""The one table of optimizers that drives the contract tests: a new method is one row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from support import set_gradients
from torch import nn

from lowrank import optimizers
from lowrank.optimizers import LowRankOptimizer, build, convert
from lowrank.optimizers.layers.optimizer import FactoredAdamW
from lowrank.optimizers.registry import without_effect


@dataclass(frozen=True)
class Row:
    """One optimizer and what it can do.

    Attributes:
        name: its name in `available()`.
        optimizer: its class.
        options: further arguments of `build`.
        capturable: whether `capturable=True` is accepted.
        bits8: moments are quantised, so equalities hold only to a code's width.
        one_sided: `proj_type="full"` is refused.
        int8: weights are INT8, so equalities hold only to a step of theirs.
        rounded_basis: what is stored under "basis" is codes.
        left_only: `proj_type` is "std" or "left", or an error.
        refits: what makes a basis: a "solver" or a random "draw" at each gap, a solver "once", or
            "never" (no basis is fitted to gradients).
        quiet: options under which parameters change by updates alone.
        rebases: a new optimizer's first step changes the parametrisation, at any learning rate.
        turns: some layers have no state for a period, and are not updated.
        still: names of a layer's factors that events alone change.
        factored: layers are replaced by factored ones, which a copied optimizer must be given.
    """

    name: str
    optimizer: type[LowRankOptimizer]
    options: dict[str, Any] = field(default_factory=dict)
    capturable: bool = False
    bits8: bool = False
    one_sided: bool = False
    int8: bool = False
    rounded_basis: bool = False
    left_only: bool = False
    refits: str = "solver"
    quiet: dict[str, Any] = field(default_factory=dict)
    factored: bool = False
    rebases: bool = False
    turns: bool = False
    still: tuple[str, ...] = ()

    @property
    def in_turn(self) -> dict[str, Any]:
        """Options under which all layers are trained at once."""
        return self.quiet if self.turns else {}

    @property
    def projects(self) -> bool:
        return self.optimizer.projects

    @property
    def slack(self) -> float:
        """How far weights may lie apart that differ by rounding alone."""
        return 5e-3 if self.int8 else 2e-3 if self.bits8 else 2e-6

    def prepare(self, model: nn.Module) -> nn.Module:
        """The model as `build` would make it."""
        return convert(self.name, model, **{"rank": 4, **self.options})

    def link(self, optimizer: LowRankOptimizer, model: nn.Module) -> None:
        """Gives a copied optimizer its layers, where it has any."""
        if isinstance(optimizer, FactoredAdamW):
            optimizer.attach(model)

    def still_factors(self, model: nn.Module) -> set[nn.Parameter]:
        """The factors that events alone change."""
        named = model.named_parameters()
        return {param for name, param in named if name.rpartition(".")[2] in self.still}

    @property
    def full_scale(self) -> dict[str, Any]:
        """Options for updates that are not scaled down."""
        return {} if self.factored else {"scale": 1.0}

    def build(self, model: nn.Module, **options: Any) -> LowRankOptimizer:
        """For a tiny model: rank 4, a refresh every 3 steps, as far as the method has these."""
        usual = {"rank": 4, "update_proj_gap": 3}
        for idle in without_effect(self.name, usual):
            del usual[idle]
        return build(self.name, model, **{"lr": 1e-2, **usual, **self.options, **options})


SMALL_8BIT = {"min_8bit_size": 0}
#: COAP without the steps in between, which need no solver and leave no orthonormal basis.
REPROJECTED = {"reproject_factor": 1}

TABLE = (
    Row("adafactor", optimizers.Adafactor),
    # At rank 4 little of a side of 5 is left outside: differences of squares magnify last bits.
    Row("alice_adamw", optimizers.AliceAdamW, {"rank": 2}, capturable=True, one_sided=True),
    Row("adamw", optimizers.AdamW, capturable=True),
    Row("adamw_8bit", optimizers.AdamW8bit, SMALL_8BIT, capturable=True, bits8=True),
    Row("apollo_adamw", optimizers.ApolloAdamW, capturable=True, one_sided=True, refits="draw"),
    Row("apollo_mini_adamw", optimizers.ApolloMiniAdamW, capturable=True, refits="draw"),
    Row(
        "coap_adafactor",
        optimizers.CoapAdafactor,
        {"beta1": 0.9, **REPROJECTED},
        one_sided=True,
    ),
    Row(
        "coap_adafactor_8bit",
        optimizers.CoapAdafactor8bit,
        {**SMALL_8BIT, **REPROJECTED},
        bits8=True,
        one_sided=True,
    ),
    Row("coap_adamw", optimizers.CoapAdamW, REPROJECTED, capturable=True, one_sided=True),
    Row(
        "coap_adamw_8bit",
        optimizers.CoapAdamW8bit,
        {**SMALL_8BIT, **REPROJECTED},
        capturable=True,
        bits8=True,
        one_sided=True,
    ),
    Row("fira_adamw", optimizers.FiraAdamW, capturable=True, one_sided=True),
    # Its moves add noise that only a long gap averages out.
    Row(
        "flora_adafactor",
        optimizers.FloraAdafactor,
        {"update_proj_gap": 40},
        one_sided=True,
        refits="never",
    ),
    Row("foam_adamw", optimizers.FoamAdamW),
    Row("frugal_adamw", optimizers.FrugalAdamW, refits="draw"),
    Row("galore_adafactor", optimizers.GaLoreAdafactor, {"beta1": 0.9}),
    Row("galore_adamw", optimizers.GaLoreAdamW, capturable=True),
    Row("galore_adamw_8bit", optimizers.GaLoreAdamW8bit, SMALL_8BIT, capturable=True, bits8=True),
    Row(
        "galore_plus_adamw",
        optimizers.GaLorePlusAdamW,
        {"heads": 2},
        capturable=True,
        left_only=True,
    ),
    Row("gradnorm_lorp_adamw", optimizers.GradNormLoRPAdamW),
    Row("galore_muon", optimizers.GaLoreMuon),
    Row("muon", optimizers.Muon),
    Row(
        "online_subspace_adafactor",
        optimizers.OnlineSubspaceAdafactor,
        {"beta1": 0.9},
        refits="once",
    ),
    Row(
        "online_subspace_adamw",
        optimizers.OnlineSubspaceAdamW,
        capturable=True,
        refits="once",
    ),
    Row(
        "online_subspace_adamw_8bit",
        optimizers.OnlineSubspaceAdamW8bit,
        SMALL_8BIT,
        capturable=True,
        bits8=True,
        refits="once",
    ),
    Row(
        "online_subspace_lion",
        optimizers.OnlineSubspaceLion,
        capturable=True,
        refits="once",
    ),
    Row(
        "qgalore_adamw_8bit",
        optimizers.QGaLoreAdamW8bit,
        {**SMALL_8BIT, "weight_bits": None},
        capturable=True,
        bits8=True,
        rounded_basis=True,
    ),
    Row(
        "qgalore_adamw_8bit",
        optimizers.QGaLoreAdamW8bit,
        SMALL_8BIT,
        capturable=True,
        bits8=True,
        rounded_basis=True,
        int8=True,
    ),
    Row("ldadam_adamw", optimizers.LDAdamW, one_sided=True),
    # Of three layers; all of them have had a turn after the second draw.
    Row("lisa_adamw", optimizers.LisaAdamW, quiet={"active_layers": 3}, turns=True),
    Row("lora_pre_adamw", optimizers.LoRAPreAdamW),
    Row("racs_adamw", optimizers.RacsAdamW),
    Row("scale_sgd", optimizers.ScaleSGD, capturable=True),
    Row(
        "cautious_adafactor",
        optimizers.CautiousAdafactor,
        {"min_quantized_size": 64},
        bits8=True,
    ),
    Row(
        "dlrt_adamw",
        optimizers.DLRTAdamW,
        quiet={"update_proj_gap": 100},
        factored=True,
        still=("left", "right"),
    ),
    Row("low_rank_adamw", optimizers.LowRankAdamW, {"refactor_gap": 3}, factored=True),
    Row(
        "loqt_adamw",
        optimizers.LoQTAdamW,
        quiet={"update_proj_gap": 100},
        factored=True,
        rebases=True,
    ),
    Row("relora_adamw", optimizers.ReLoRAAdamW, {"reset": "zero"}, factored=True),
    Row("sltrain_adamw", optimizers.SLTrainAdamW, {"density": 0.1}, factored=True),
    Row(
        "sltrain_adamw_8bit",
        optimizers.SLTrainAdamW8bit,
        {**SMALL_8BIT, "density": 0.1, "refactor_gap": 3},
        bits8=True,
        factored=True,
    ),
    Row("sst_adamw", optimizers.SSTAdamW, quiet={"update_proj_gap": 100}, factored=True),
    Row(
        "switchlora_adamw",
        optimizers.SwitchLoRAAdamW,
        {"switch_interval": 10.0, "total_steps": 100, "descent_rate": 10.0},
        quiet={"switch_interval": 1e12},
        factored=True,
    ),
)
PROJECTING = tuple(row for row in TABLE if row.projects)


DTYPES = (torch.float32, torch.bfloat16)


def identifier(row: Row) -> str:
    return f"{row.name}-int8" if row.int8 else row.name


#: One row of each kind; what is the engine's own is tried on these.
KINDS = (
    "adamw",
    "galore_adamw",
    "coap_adafactor_8bit",
    "online_subspace_lion",
    "qgalore_adamw_8bit-int8",
    "relora_adamw",
)
REPRESENTATIVE = tuple(row for row in TABLE if identifier(row) in KINDS)

every = pytest.mark.parametrize("row", TABLE, ids=identifier)
#: Every row, of which all but the representative ones are slow.
every_slowly = pytest.mark.parametrize(
    "row",
    [pytest.param(row, marks=() if row in REPRESENTATIVE else pytest.mark.slow) for row in TABLE],
    ids=identifier,
)
representative = pytest.mark.parametrize("row", REPRESENTATIVE, ids=identifier)
projecting = pytest.mark.parametrize("row", PROJECTING, ids=identifier)
representative_projecting = pytest.mark.parametrize(
    "row", [row for row in REPRESENTATIVE if row.projects], ids=identifier
)


#: The papers' size whose tests are quick; the others' are slow.
SMALLEST = "60m"


def each_size(sizes: Iterable[str]) -> pytest.MarkDecorator:
    """Model sizes, of which all but the smallest are slow tests."""
    marks = {size: () if size == SMALLEST else (pytest.mark.slow,) for size in sizes}
    return pytest.mark.parametrize(
        "size", [pytest.param(size, marks=mark) for size, mark in marks.items()]
    )


def every_with(
    name: str, values: Sequence[Any], rows: Sequence[Row] = TABLE, kinds: Sequence[str] = KINDS
) -> pytest.MarkDecorator:
    """Every row with the first value, and rows of the given kinds with all of them."""
    pairs = [
        pytest.param(row, value, id=f"{identifier(row)}-{value}")
        for row in rows
        for value in (values if identifier(row) in kinds else values[:1])
    ]
    return pytest.mark.parametrize(("row", name), pairs)


def refitted(*kinds: str) -> list[Row]:
    """The projecting rows whose bases come about in one of these ways."""
    return [row for row in PROJECTING if row.refits in kinds]


def refitting(*kinds: str) -> pytest.MarkDecorator:
    """A test of these rows."""
    return pytest.mark.parametrize("row", refitted(*kinds), ids=identifier)


def assert_same(first: nn.Module, second: nn.Module) -> None:
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def assert_close(first: nn.Module, second: nn.Module, rtol: float, atol: float) -> None:
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: range,
    gradients: Callable[[nn.Module, int], None] = set_gradients,
) -> None:
    """Takes steps with deterministic gradients."""
    for step in steps:
        gradients(model, step)
        optimizer.step()


def weight_of(layer: nn.Module) -> nn.Parameter:
    """A layer's weight, or its first trained part."""
    weight: nn.Parameter = getattr(layer, getattr(layer, "FACTORS", ("weight",))[0])
    return weight
