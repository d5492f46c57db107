"""The settings of a model, and how settings are checked."""

from __future__ import annotations

from dataclasses import dataclass

DTYPES = ("float32", "bfloat16")
#: Beyond any model's, so that a slip of the finger is told before anything is allocated.
LARGEST_SIZE, MOST_LAYERS = 2**24, 10_000
WEIGHT_BITS = (16, 8, 4, None)


def require(condition: bool, key: str, value: object, accepted: str) -> None:
    """Raises `ValueError` with a key, its value and what is accepted."""
    if not condition:
        raise ValueError(f"{key} is {value!r}; accepted: {accepted}")


@dataclass(frozen=True)
class ModelConfig:
    """A LLaMA's shape and how it is held.

    Attributes:
        name: the preset the shape came from (informative once resolved).
        hidden_size: width of the residual stream.
        intermediate_size: width of the gated feed-forward layer.
        num_hidden_layers: number of blocks.
        num_attention_heads: heads per block; must divide `hidden_size` into even parts.
        vocab_size: rows of the embedding and of the (untied) output head.
        rope_theta: base of the rotary position embedding.
        rms_norm_eps: epsilon of the normalisations.
        initializer_range: standard deviation of the initial weights.
        dtype: dtype of weights, gradients and activations, "float32" or "bfloat16".
        weight_bits: 16 for dense weights (in `dtype`), 8 or 4 for quantised ones in the layers that
            the optimizer projects, null for the optimizer's own (8 for qgalore_adamw_8bit, else
            dense). The optimizer's option of that name may not contradict it;
            `optimizer.weight_include` and `optimizer.weight_group_size` go with it.
        activation_checkpointing: recompute each block in the backward pass.
        compressed_activations: columns to which the inputs that projected layers keep for the
            backward pass are compressed (CompAct); 0 keeps them whole. Gradients of these weights
            are then exact on average only.
        compression_gap: steps between draws of the random projections.
        autocast: compute products in bfloat16 (`torch.autocast`) with float32 weights; gradients
            and the optimizer's state stay float32.
        compile: run the blocks through `torch.compile`.
        initial: a checkpoint's folder (a run's or Hugging Face's, with `model.safetensors`) whose
            weights the run starts from, "" for random ones; ReLoRA's full-rank warm start.
    """

    name: str = "llama_9m"
    hidden_size: int = 320
    intermediate_size: int = 864
    num_hidden_layers: int = 5
    num_attention_heads: int = 5
    vocab_size: int = 4096
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    dtype: str = "float32"
    weight_bits: int | None = None
    activation_checkpointing: bool = False
    compressed_activations: int = 0
    compression_gap: int = 50
    autocast: bool = False
    compile: bool = False
    initial: str = ""

    def __post_init__(self) -> None:
        for key in (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "vocab_size",
        ):
            value = getattr(self, key)
            most = MOST_LAYERS if key == "num_hidden_layers" else LARGEST_SIZE
            require(1 <= value <= most, f"model.{key}", value, f"a whole number from 1 to {most:,}")
        require(
            self.hidden_size % (2 * self.num_attention_heads) == 0,
            "model.num_attention_heads",
            self.num_attention_heads,
            f"a number that divides hidden_size ({self.hidden_size}) into heads of even width",
        )
        for key in ("rope_theta", "rms_norm_eps", "initializer_range"):
            value = getattr(self, key)
            require(value > 0, f"model.{key}", value, "a positive number")
        require(self.dtype in DTYPES, "model.dtype", self.dtype, " or ".join(DTYPES))
        require(
            not self.autocast or self.dtype == "float32",
            "model.autocast",
            self.autocast,
            f"false with model.dtype={self.dtype}, whose products are in bfloat16 anyway",
        )
        rank = self.compressed_activations
        require(rank >= 0, "model.compressed_activations", rank, "0 (off) or a number of columns")
        require(
            not rank or not (self.activation_checkpointing or self.compile),
            "model.compressed_activations",
            rank,
            "0 with model.activation_checkpointing, which keeps none of these inputs, and with"
            " model.compile",
        )
        gap = self.compression_gap
        require(gap >= 1, "model.compression_gap", gap, "a number of steps, at least 1")
        bits = self.weight_bits
        require(bits in WEIGHT_BITS, "model.weight_bits", bits, "16, 8, 4 or null")
