"""What a new method needs: one class, of parts that exist."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from rich.console import Console
from support import set_gradients, tiny_model
from table import assert_same, train
from torch import nn

from lowrank.optimizers import (
    CoapAdamW,
    GaLoreAdamW,
    LowRankOptimizer,
    available,
    build,
    describe,
    expected_state_bytes,
    method_table,
    param_groups,
    state_bytes,
)
from lowrank.optimizers.engine.method import TABLE, method, unregister
from lowrank.optimizers.engine.rule_families import LION
from lowrank.optimizers.engine.strategies import (
    PROJECTORS,
    register_projector,
    unregister_projector,
)
from lowrank.optimizers.projectors import Bases, DCTProjector, ProjectedParam, Projector


def declare() -> type[LowRankOptimizer]:
    # The method begins here.
    @method(
        "signed_lion",
        summary="Lion in GaLore's subspace, the sign of the gradient outside it",
        state="m r + n r",
        spellings=("SLion",),
    )
    class SignedLion(LowRankOptimizer):
        """Lion in the leading singular subspace, signSGD outside it."""

        rule = LION.but(lr=3e-4)
        projection_defaults = {"projector": "singular", "residual": "sign"}  # noqa: RUF012
        aliases = {"share": "inactive_lr_scale"}  # noqa: RUF012

    # The method ends here.
    return SignedLion


@pytest.fixture(autouse=True)
def signed_lion() -> Iterator[type[LowRankOptimizer]]:
    yield declare()
    unregister("signed_lion")
    assert "signed_lion" not in available()


def test_it_is_short() -> None:
    lines = inspect.getsource(declare).splitlines()
    assert len(lines) <= 40


def test_it_is_listed() -> None:
    from lowrank.trainers.methods import print_methods

    assert "signed_lion" in available()
    assert describe("signed_lion").startswith("Lion in GaLore's subspace")
    console = Console(width=200, record=True, quiet=True)
    console.quiet = False
    with console.capture() as captured:
        print_methods(console)
    assert "signed_lion" in captured.get()
    assert "| `signed_lion` | `SignedLion` |" in method_table()


def test_it_trains_and_resumes_to_the_bit(signed_lion: type[LowRankOptimizer]) -> None:
    def made(model: nn.Module) -> LowRankOptimizer:
        return build("signed_lion", model, rank=4, update_proj_gap=3, share=0.5)

    straight, model = tiny_model(), tiny_model()
    first, second = made(straight), made(model)
    assert isinstance(first, signed_lion)
    assert first.param_groups[0]["inactive_lr_scale"] == 0.5
    assert first.param_groups[0]["lr"] == 3e-4
    tokens = torch.randint(0, 32, (8, 12))
    losses = []
    for _ in range(40):
        loss = nn.functional.cross_entropy(straight(tokens).flatten(0, 1), tokens.flatten())
        first.zero_grad()
        loss.backward()
        first.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    straight, model = tiny_model(), tiny_model()
    first, second = made(straight), made(model)
    train(straight, first, range(8))
    train(model, second, range(4))
    saved = copy.deepcopy(second.state_dict())
    second = made(model)
    second.load_state_dict(saved)
    train(model, second, range(4, 8))
    assert_same(straight, model)


def test_its_state_is_the_formula() -> None:
    model = nn.ModuleDict({"attn": nn.Linear(48, 32, bias=False)})
    optimizer = build("signed_lion", model, rank=8)
    m, n, r = 32, 48, 8
    assert TABLE["signed_lion"].state == "m r + n r"
    assert state_bytes(optimizer) == 4 * (m * r + n * r) + 4
    assert expected_state_bytes("signed_lion", model, rank=8) == state_bytes(optimizer)
    set_gradients(model, 0)
    optimizer.step()
    assert state_bytes(optimizer) == 4 * (m * r + n * r) + 4


def test_names_are_taken_once() -> None:
    with pytest.raises(ValueError, match=r"signed_lion.*already"):
        declare()
    for name, spelling in (("other", "GaLoreAdamW"), ("galore_adamw", "Other")):
        with pytest.raises(ValueError, match="already"):
            method(name, summary="", state="", spellings=(spelling,))(
                type("Unheard", (LowRankOptimizer,), {"rule": LION})
            )
    assert "other" not in available()


def test_a_projector_is_registered_once_and_whole() -> None:
    class Unfinished(Projector):
        pass

    with pytest.raises(ValueError, match="'dct' is DCTProjector already"):
        register_projector("dct")(DCTProjector)
    with pytest.raises(TypeError, match=r"Unfinished lacks \['fit'\]"):
        register_projector("unfinished")(Unfinished)
    with pytest.raises(TypeError, match="is no Projector"):
        register_projector("other")(nn.Linear)  # type: ignore[type-var]
    assert {"unfinished", "other"}.isdisjoint(PROJECTORS)


def test_a_registered_projector_brings_its_options() -> None:
    @register_projector("first_columns")
    @dataclass(frozen=True)
    class FirstColumns(Projector):
        OPTIONS = ("offset",)
        offset: int = 0

        def fit(self, params: Sequence[ProjectedParam]) -> list[Bases | None]:
            for param in params:
                (shape,) = param.geometry.basis_shapes.values()
                self.store(param, (torch.eye(*shape).roll(self.offset, 0),))
            return [self.bases(param) for param in params]

    try:
        model = nn.ModuleDict({"attn": nn.Linear(12, 8, bias=False)})
        before = model["attn"].weight.detach().clone()
        optimizer = build("galore_adamw", model, rank=2, projector="first_columns", offset=3)
        model["attn"].weight.grad = torch.ones(8, 12)
        optimizer.step()
        changed = (model["attn"].weight != before).any(1).nonzero().flatten()
        assert changed.tolist() == [3, 4]
        with pytest.raises(ValueError, match=r"offset=3: accepted with projector='first_columns'"):
            build("galore_adamw", model, rank=2, offset=3)
        groups = param_groups(model, rank=2)
        made = GaLoreAdamW(groups, projector="first_columns", offset=1)
        assert made.param_groups[0]["offset"] == 1
        with pytest.raises(ValueError, match=r"offset=1: accepted with projector='first_columns'"):
            GaLoreAdamW(groups, offset=1)
        own = type("Own", (GaLoreAdamW,), {"projection_defaults": {"projector": "first_columns"}})
        assert inspect.signature(own).parameters["offset"].default == 0
        for shown in (GaLoreAdamW.__doc__, CoapAdamW.__doc__):
            assert "offset (projector='first_columns')" in " ".join((shown or "").split())
            assert "'first_columns'" in (shown or "").partition("refresh:")[0]
    finally:
        unregister_projector("first_columns")
    assert "first_columns" not in (GaLoreAdamW.__doc__ or "")
    with pytest.raises(ValueError, match="offset"):
        GaLoreAdamW(param_groups(model, rank=2), offset=1)


def test_a_page_in_the_folder_is_all_it_takes(tmp_path: Path) -> None:
    """A page that lies in `methods` is found, and its class exported, without an edit elsewhere."""
    import subprocess
    import sys

    import lowrank.optimizers

    root = tmp_path / "lowrank" / "optimizers"
    source = Path(lowrank.optimizers.__file__).resolve().parent
    root.parent.mkdir()
    (tmp_path / "lowrank" / "cuda").symlink_to(source.parent / "cuda")
    root.mkdir()
    for entry in source.iterdir():
        if entry.name != "methods":
            (root / entry.name).symlink_to(entry)
    (root / "methods").mkdir()
    for page in (source / "methods").glob("*.py"):
        (root / "methods" / page.name).symlink_to(page)
    (root / "methods" / "new.py").write_text(
        "from ..engine.method import method\n"
        "from ..engine.optimizer import LowRankOptimizer\n"
        "from ..engine.rule_families import SGD\n"
        '@method("new_sgd", summary="new", state="m r + n r")\n'
        "class NewSGD(LowRankOptimizer):\n"
        "    rule = SGD\n"
    )
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import lowrank.optimizers as o\n"
        "from lowrank.optimizers import NewSGD\n"
        "assert 'NewSGD' in o.__all__ and 'new_sgd' in o.available(), o.__file__\n"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True, cwd=tmp_path)
