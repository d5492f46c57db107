"""Writes `checkpoints/`: what version 0.1.0 saved, and the weights it went on to.

Run by hand, at the version whose files are to be kept:

    python tests/optimizers/make_checkpoint_fixture.py

`test_saved_checkpoints.py` loads the files with whatever the code is now. Files of a version that
people have used are never made anew; a later version adds a folder of its own. Gradients are stored
as well, so that no test depends on a random generator's stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.optimizers import CoapAdafactor, CoapAdamW, LowRankOptimizer, available, build

FOLDER = Path(__file__).resolve().parent / "checkpoints"
GRADIENTS = FOLDER / "gradients.pt"
#: Steps before a file is saved, which hold two refreshes, and after, which hold one more.
BEFORE, AFTER = 4, 4
#: Name and (rows, columns) of the hidden matrices' layers.
LAYERS = {"self_attn.q_proj": (16, 32), "mlp.down_proj": (32, 16)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class SmallModel(nn.Module):
    """An embedding, two hidden matrices, a norm, and a convolution if asked for."""

    def __init__(self, convolution: bool = False) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(8, 32)
        self.self_attn = nn.ModuleDict({"q_proj": nn.Linear(32, 16, bias=False)})
        self.mlp = nn.ModuleDict({"down_proj": nn.Linear(16, 32)})
        self.norm = nn.LayerNorm(32)
        if convolution:
            self.conv = nn.Conv2d(6, 8, 3, bias=False)


@dataclass(frozen=True)
class Case:
    """One file.

    Attributes:
        name: of the method in `available()`.
        kind: what further steps owe. "exact": the stored weights. "until_draw": the stored weights
            up to the next random draw, whose numbers may be other ones in another version.
            "redrawn": bases are drawn anew at every step, so finite weights. "rounded": weights are
            rounded stochastically, so the stored weights to within what that leaves open.
        options: of `build`.
        dtype: of the weights, a key of `DTYPES`.
        variant: what tells the file's name from the method's plain one.
        quiet: steps until the next draw, for "until_draw".
        convolution: the model has a convolution, and groups are made for it by hand.
    """

    name: str
    kind: str = "exact"
    options: dict[str, Any] = field(default_factory=dict)
    dtype: str = "fp32"
    variant: str = ""
    quiet: int = AFTER
    convolution: bool = False

    @property
    def file(self) -> str:
        return "-".join(filter(None, (self.name, self.variant, self.dtype))) + ".pt"

    @property
    def steps(self) -> int:
        """After how many further steps weights are stored."""
        return 0 if self.kind == "redrawn" else self.quiet


BITS8 = {"min_8bit_size": 0}
COAP = {"update_proj_gap": 3, "reproject_factor": 2}
#: Events of layers come at the end of a step: two in the first four, the next in the second more.
EVENTS = {"update_proj_gap": 2}
SPARSE = {"density": 0.1, "refactor_gap": 2}

PLAIN = (
    Case("adafactor"),
    Case("adamw"),
    Case("adamw_8bit", options=BITS8),
    Case("apollo_adamw", "redrawn"),
    Case("apollo_mini_adamw", "redrawn", {"rank": 1}),
    Case("coap_adafactor", options=COAP),
    Case("coap_adafactor_8bit", options={**COAP, **BITS8, "beta1": 0.9}),
    Case("coap_adamw", options=COAP),
    Case("coap_adamw_8bit", options={**COAP, **BITS8}),
    Case("fira_adamw"),
    Case("flora_adafactor", "redrawn"),
    Case("frugal_adamw", "until_draw", quiet=2),
    Case("galore_adafactor"),
    Case("galore_adamw"),
    Case("galore_adamw_8bit", options=BITS8),
    Case("galore_muon"),
    Case("galore_plus_adamw", "until_draw", {"heads": 2}, quiet=2),
    Case("loqt_adamw", options=EVENTS),
    Case("low_rank_adamw", options={"refactor_gap": 2}),
    Case("muon"),
    Case("online_subspace_adafactor"),
    Case("online_subspace_adamw"),
    Case("online_subspace_adamw_8bit", options=BITS8),
    Case("online_subspace_lion", options={"lr": 1e-3}),
    Case("qgalore_adamw_8bit", options={**BITS8, "weight_bits": None}),
    Case("relora_adamw", "until_draw", EVENTS, quiet=1),
    Case("sltrain_adamw", options=SPARSE),
    Case("sltrain_adamw_8bit", options={**SPARSE, **BITS8}),
    Case("sst_adamw", "until_draw", EVENTS, quiet=1),
    Case(
        "switchlora_adamw",
        "until_draw",
        {"switch_interval": 10.0, "total_steps": 100, "descent_rate": 10.0},
        quiet=0,
    ),
)
VARIANTS = (
    Case("adamw", dtype="bf16"),
    Case("apollo_adamw", options={"projector": "singular"}, variant="singular"),
    Case("coap_adafactor", options=COAP, variant="convolution", convolution=True),
    Case("coap_adamw", options=COAP, variant="convolution", convolution=True),
    Case("coap_adamw", options=COAP, dtype="bf16"),
    Case("fira_adamw", dtype="bf16"),
    Case("flora_adafactor", "redrawn", {"beta1": 0.9}, variant="momentum"),
    Case("galore_adafactor", options={"beta1": 0.9}, variant="momentum"),
    Case("galore_adamw", dtype="bf16"),
    Case("galore_adamw", options={"proj_type": "full"}, variant="full"),
    Case(
        "galore_adamw",
        options={"proj_type": "reverse_std", "moments": "rotate", "stagger": True},
        variant="rotated",
    ),
    Case("galore_adamw", "rounded", {"stochastic_rounding": True}, "bf16", variant="rounded"),
    Case("galore_adamw_8bit", options=BITS8, dtype="bf16"),
    Case(
        "online_subspace_adamw",
        "until_draw",
        {"proj_type": "random"},
        variant="random",
        quiet=2,
    ),
    Case("online_subspace_adamw", dtype="bf16"),
    Case("qgalore_adamw_8bit", "rounded", BITS8, variant="int8"),
    Case("qgalore_adamw_8bit", "rounded", BITS8, "bf16", variant="int8"),
    Case("relora_adamw", "until_draw", EVENTS, "bf16", quiet=1),
    Case("sltrain_adamw", options={**SPARSE, "support": "stored"}, variant="stored"),
)
CASES = (*PLAIN, *VARIANTS)


def small_model(case: Mapping[str, Any]) -> SmallModel:
    """A model for a file's metadata, before its weights are loaded."""
    torch.manual_seed(0)
    return SmallModel(case["convolution"]).to(DTYPES[case["dtype"]])


def optimizer_for(case: Mapping[str, Any], model: SmallModel) -> LowRankOptimizer:
    """The optimizer of a file's metadata; it may convert the model."""
    options = {"lr": 1e-2, "rank": 4, "update_proj_gap": 3, **case["options"]}
    if not case["convolution"]:
        return build(case["name"], model, **options)
    coap = {"coap_adafactor": CoapAdafactor, "coap_adamw": CoapAdamW}[case["name"]]
    lr, rank = options.pop("lr"), options.pop("rank")
    named = dict(model.named_parameters())
    hidden = [named.pop(f"{layer}.weight") for layer in LAYERS]
    kernel = named.pop("conv.weight")
    return coap(
        [
            {"params": hidden, "rank": rank, **options},
            {"params": [kernel], "rank_ratio_cnn": 2.0, **options},
            {"params": [*named.values()]},
        ],
        lr=lr,
    )


def take_step(
    model: SmallModel, optimizer: torch.optim.Optimizer, gradients: Mapping[str, Tensor]
) -> None:
    """One step with given gradients; layers without a dense weight run backward to get theirs."""
    for layer in LAYERS:
        module = model.get_submodule(layer)
        if not isinstance(getattr(module, "weight", None), nn.Parameter):
            dtype = next(module.parameters()).dtype
            y = module(gradients[f"{layer}.input"].to(dtype))
            y.backward(gradients[f"{layer}.output"].to(dtype))
    for name, param in model.named_parameters():
        if param.grad is None and name in gradients:
            param.grad = gradients[name].to(param.dtype)
    optimizer.step()
    optimizer.zero_grad()


def outputs(model: SmallModel, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the hidden layers make of the first inputs: equal where equal weights were loaded."""
    made = {}
    with torch.no_grad():
        for layer in LAYERS:
            module = model.get_submodule(layer)
            x = gradients[f"{layer}.input"][:2]
            made[layer] = module(x.to(next(module.parameters()).dtype)).clone()
    return made


def draw_gradients(steps: int) -> list[dict[str, Tensor]]:
    """Gradients, and inputs and output gradients of layers, whose singular values lie apart."""
    generator = torch.Generator().manual_seed(20)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    model = SmallModel(convolution=True)
    base = {}
    for name, param in model.named_parameters():
        base[name] = noise(*param.shape)
        if param.dim() == 2:
            u, s, vh = torch.linalg.svd(base[name], full_matrices=False)
            base[name] = (u * (3.0 * s[0] * 0.7 ** torch.arange(len(s)))) @ vh
    made = []
    for _ in range(steps):
        step = {name: 1e-2 * (b + 0.6 * noise(*b.shape)) for name, b in base.items()}
        for layer, (rows, columns) in LAYERS.items():
            step[f"{layer}.input"] = noise(8, columns)
            step[f"{layer}.output"] = 1e-2 * noise(8, rows)
        made.append(step)
    return made


def owned(value: Any) -> Any:
    """A copy whose tensors have just the storage they need."""
    if isinstance(value, Tensor):
        return value.detach().clone(memory_format=torch.contiguous_format)
    if isinstance(value, Mapping):
        return {key: owned(entry) for key, entry in value.items()}
    return [owned(entry) for entry in value] if isinstance(value, list) else value


def main() -> None:
    assert {case.name for case in PLAIN} == set(available())
    FOLDER.mkdir(exist_ok=True)
    gradients = draw_gradients(BEFORE + AFTER)
    torch.save(gradients[BEFORE:], GRADIENTS)
    for case in CASES:
        metadata = {
            "version": "0.1.0",
            "name": case.name,
            "kind": case.kind,
            "options": case.options,
            "dtype": case.dtype,
            "convolution": case.convolution,
            "steps": case.steps,
        }
        model = small_model(metadata)
        optimizer = optimizer_for(metadata, model)
        for step in gradients[:BEFORE]:
            take_step(model, optimizer, step)
        saved = owned(
            {
                "metadata": metadata,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "outputs": outputs(model, gradients[BEFORE]),
            }
        )
        for step in gradients[BEFORE : BEFORE + case.steps]:
            take_step(model, optimizer, step)
        saved["later"] = owned(model.state_dict()) if case.steps else None
        torch.save(saved, FOLDER / case.file)
    total = sum(path.stat().st_size for path in FOLDER.iterdir())
    print(f"{len(CASES)} files and gradients, {total / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
