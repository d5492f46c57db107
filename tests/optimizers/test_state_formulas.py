"""State bytes at the papers' five sizes, written out independently, equal what is measured.

For a projected matrix of short side m and long side n, rank r, b bytes an entry (bf16: 2) and s
bytes an entry of a moment (4; 2 with moments_dtype="bfloat16"):

    GaLore, Fira, COAP   b m r + 2 s n r           Online Subspace Descent   (b + 2 s) m r + 2 s n r
    8-bit moments        n r + 4 ceil(n r / 256) for each of two, fp32 below 4096 entries
    Q-GaLore's basis     m r / 2 and 2 b ceil(m r / 256)

and everything else 2 s bytes an entry. Small terms: `step`, 4 bytes a parameter; a limiter's norm,
4 a matrix; Q-GaLore's leading vector and queue, 4 (m + 5); FRUGAL's indices, 4 r.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from types import SimpleNamespace

import pytest
import torch
from table import each_size
from torch import nn

from lowrank.optimizers import available, build, expected_state_bytes, state_bytes

#: hidden, ffn, layers, heads, rank, parameters
SIZES = {
    "60m": (512, 1376, 8, 8, 128, 58_073_600),
    "130m": (768, 2048, 12, 12, 256, 134_105_856),
    "350m": (1024, 2736, 24, 16, 256, 367_969_280),
    "1b": (2048, 5461, 24, 32, 512, 1_339_082_752),
    "7b": (4096, 11008, 32, 32, 1024, 6_738_415_616),
}
VOCABULARY = 32000
B = 2


class Llama(nn.Module):
    """LLaMA's parameters under its names."""

    def __init__(self, hidden: int, inner: int, layers: int, heads: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_attention_heads=heads, num_key_value_heads=heads)

        def linear(columns: int, rows: int) -> nn.Linear:
            return nn.Linear(columns, rows, bias=False)

        self.embed_tokens = nn.Embedding(VOCABULARY, hidden)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "self_attn": nn.ModuleDict(
                        {f"{part}_proj": linear(hidden, hidden) for part in "qkvo"}
                    ),
                    "mlp": nn.ModuleDict(
                        {
                            "gate_proj": linear(hidden, inner),
                            "up_proj": linear(hidden, inner),
                            "down_proj": linear(inner, hidden),
                        }
                    ),
                    "input_layernorm": nn.RMSNorm(hidden),
                    "post_attention_layernorm": nn.RMSNorm(hidden),
                }
            )
            for _ in range(layers)
        )
        self.norm = nn.RMSNorm(hidden)
        self.lm_head = linear(hidden, VOCABULARY)


def model_of(size: str) -> Llama:
    hidden, inner, layers, heads, _, parameters = SIZES[size]
    with torch.device("meta"):
        model = Llama(hidden, inner, layers, heads).to(torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == parameters
    return model


class Counts:
    """What the formulas are sums over: pairs (m, n) of projected matrices and other sizes."""

    def __init__(self, size: str) -> None:
        hidden, inner, layers, self.heads, self.rank, _ = SIZES[size]
        self.hidden, self.layers = hidden, layers
        self.matrices = [(hidden, hidden)] * (4 * layers) + [(hidden, inner)] * (3 * layers)
        self.others = [VOCABULARY * hidden] * 2 + [hidden] * (2 * layers + 1)
        self.steps = 4 * (len(self.matrices) + len(self.others))

    def total(self, of_matrix: Callable[[int, int], float], of_other: Callable[[int], int]) -> int:
        return int(
            self.steps
            + sum(of_matrix(m, n) for m, n in self.matrices)
            + sum(of_other(count) for count in self.others)
        )


#: Bytes of an entry of a moment, by the option.
MOMENTS = {None: 4, "bfloat16": 2}


def bits8(count: int) -> int:
    return 2 * (count + 4 * ceil(count / 256)) if count >= 4096 else 8 * count


def adafactor(count: int, hidden: int, first: int) -> int:
    """`first`: bytes an entry of the first moment."""
    return first * count + (4 * count if count == hidden else 4 * (VOCABULARY + hidden))


def formula(name: str, c: Counts, s: int) -> int:
    r = c.rank

    def plain(count: int) -> int:
        return 2 * s * count

    factored = [(lambda n, first=first: adafactor(n, c.hidden, first)) for first in (0, s)]
    galore = lambda m, n: B * m * r + 2 * s * n * r  # noqa: E731
    formulas: dict[str, tuple[Callable[[int, int], float], Callable[[int], int]]] = {
        "adamw": (lambda m, n: 2 * s * m * n, plain),
        "adamw_8bit": (lambda m, n: bits8(m * n), bits8),
        "adafactor": (lambda m, n: 4 * (m + n), factored[0]),
        "muon": (lambda m, n: s * m * n, plain),
        "galore_adamw": (galore, plain),
        "galore_adamw_8bit": (lambda m, n: B * m * r + bits8(n * r), bits8),
        "galore_adafactor": (lambda m, n: B * m * r + 4 * (r + n), factored[0]),
        "galore_muon": (lambda m, n: B * m * r + s * n * r, plain),
        "fira_adamw": (lambda m, n: galore(m, n) + 4, plain),
        "qgalore_adamw_8bit": (
            lambda m, n: m * r / 2 + 2 * B * ceil(m * r / 256) + bits8(n * r) + 4 * (m + 5),
            bits8,
        ),
        "coap_adamw": (galore, plain),
        "coap_adamw_8bit": (lambda m, n: B * m * r + bits8(n * r), bits8),
        "coap_adafactor": (lambda m, n: B * m * r + 4 * (r + n), factored[0]),
        "online_subspace_adamw": (lambda m, n: (B + 2 * s) * m * r + 2 * s * n * r, plain),
        "online_subspace_adamw_8bit": (lambda m, n: (B + 2 * s) * m * r + bits8(n * r), bits8),
        "online_subspace_adafactor": (lambda m, n: (B + 2 * s) * m * r + 4 * (r + n), factored[0]),
        "online_subspace_lion": (lambda m, n: (B + 2 * s) * m * r + s * n * r, lambda n: s * n),
        "apollo_adamw": (lambda m, n: 2 * s * n * r + 4, plain),
        "apollo_mini_adamw": (lambda m, n: 2 * s * n + 4, plain),
        "frugal_adamw": (lambda m, n: 2 * s * n * r + 4 * r, plain),
        "alice_adamw": (lambda m, n: galore(m, n) + 4 * (r * r + n + 1), plain),
        # momentum of the head, one of two of a size
        "scale_sgd": (lambda m, n: 0, lambda n: 2 * s * n if n == c.hidden else s * n // 2),
        "racs_adamw": (lambda m, n: 4 * (m + n + 1), plain),
        "lora_pre_adamw": (lambda m, n: 2 * s * r * (m + n), plain),
        "ldadam_adamw": (lambda m, n: galore(m, n) + B * m * n, plain),
        "flora_adafactor": (lambda m, n: s * n * r + 4 * (m + n), factored[1]),
    }
    if name in ("relora_adamw", "low_rank_adamw"):  # two factors, each with a step count
        return c.total(lambda m, n: 2 * s * r * (m + n) + 4, plain)
    h, inner = c.matrices[-1]
    if name == "lisa_adamw":  # two layers with two norms, and all that is in none
        layer = 4 * h * h + 3 * h * inner + 2 * h
        return c.steps + 2 * s * (2 * layer + 2 * VOCABULARY * h + h)
    if name == "gradnorm_lorp_adamw":  # and two numbers for each row
        return c.total(galore, plain) + 8 * c.layers * (5 * h + 2 * inner)
    if name == "dlrt_adamw":  # of S; three step counts a matrix
        return c.total(lambda m, n: 2 * s * min(2 * r, m, n) ** 2 + 8, plain)
    if name == "cautious_adafactor":  # in rows of h entries, of inner ones in down projections

        def own(m: int, n: int) -> int:
            return m * (ceil(n / 2) + 4 * ceil(n / 128)) + 4 * (m + n)

        layer = 4 * own(h, h) + 2 * own(inner, h) + own(h, inner)
        return c.total(lambda m, n: 0, factored[0]) + c.layers * layer
    if name == "foam_adamw":  # blocks of 4 lie in rows: of inner entries in the down projections
        blocks = 4 * h * ceil(h / 4) + 2 * inner * ceil(h / 4) + h * ceil(inner / 4)
        return c.total(lambda m, n: 0, plain) + 2 * s * c.layers * blocks
    if name == "sltrain_adamw":  # and the values of the sparse part
        return c.total(lambda m, n: 2 * s * (r * (m + n) + int(0.03 * m * n)) + 8, plain)
    if name == "sltrain_adamw_8bit":
        return c.total(
            lambda m, n: bits8(r * m) + bits8(r * n) + bits8(int(0.03 * m * n)) + 8, bits8
        )
    if name == "loqt_adamw":  # one factor, on the longer side
        return c.total(lambda m, n: 2 * s * r * max(m, n), plain)
    if name == "sst_adamw":  # all singular values, r vectors a side
        return c.total(lambda m, n: 2 * s * (r * (m + n) + min(m, n)) + 8, plain)
    if name == "switchlora_adamw":  # and two counts for each vector
        return c.total(lambda m, n: 2 * s * r * (m + n) + 4 + 16 * r, plain)
    if name == "coap_adafactor_8bit":  # the first moment in 8 bits, here and in full
        half = [bits8(n * r) // 2 for _, n in c.matrices]
        rest = c.total(lambda m, n: B * m * r + 4 * (r + n), factored[0])
        return rest + sum(half) + sum(bits8(count) // 2 for count in c.others)
    if name == "galore_plus_adamw":
        each = r // c.heads
        heads = B * c.hidden // c.heads * each + 2 * s * c.hidden * each * c.heads
        return c.total(galore, plain) - 3 * c.layers * (galore(c.hidden, c.hidden) - heads)
    return c.total(*formulas[name])


@each_size(SIZES)
@pytest.mark.parametrize("name", available())
def test_formula_of_each_size(name: str, size: str) -> None:
    counts = Counts(size)
    rank = 1 if name == "apollo_mini_adamw" else counts.rank
    model = model_of(size)
    for moments_dtype, s in MOMENTS.items():
        if moments_dtype is None or "8bit" not in name:
            found = expected_state_bytes(name, model, rank=rank, moments_dtype=moments_dtype)
            assert found == formula(name, counts, s)


def test_8bit_moments_have_one_precision() -> None:
    with pytest.raises(ValueError, match="moments_dtype='bfloat16'"):
        expected_state_bytes("galore_adamw_8bit", model_of("60m"), moments_dtype="bfloat16")


@pytest.mark.parametrize("name", available())
def test_measured_on_the_meta_device(name: str) -> None:
    model = model_of("7b")
    del model.layers[1:]  # all layers are alike
    rank = 1 if name == "apollo_mini_adamw" else 1024
    expected = expected_state_bytes(name, model, rank=rank)
    assert state_bytes(build(name, model, rank=rank)) == expected


def test_reference_values() -> None:
    """The table that people quote, in units of 1e9 bytes: moments in bf16."""
    values = {"adamw": 26.95, "galore_adamw": 9.40, "galore_adamw_8bit": 5.70, "adamw_8bit": 13.69}
    for name, gigabytes in values.items():
        assert formula(name, Counts("7b"), 2) / 1e9 == pytest.approx(gigabytes, abs=0.02)
