"""A LLaMA to take training steps with: transformers', or a plain one where that is missing."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .workload import Model

Batch = Tensor


class Plain(nn.Module):
    """LLaMA in plain torch, with transformers' parameter names."""

    def __init__(self, model: Model) -> None:
        """On torch's current default device, in its default type."""
        super().__init__()
        self.width = model.hidden // model.heads
        self.embed_tokens = nn.Embedding(model.vocabulary, model.hidden)
        self.layers = nn.ModuleList(_Block(model) for _ in range(model.layers))
        self.norm = nn.RMSNorm(model.hidden, eps=1e-6)
        self.lm_head = nn.Linear(model.hidden, model.vocabulary, bias=False)
        for weight in self.parameters():
            if weight.dim() > 1:
                nn.init.normal_(weight, std=0.02)

    def forward(self, tokens: Batch) -> Tensor:
        """The mean loss of predicting each token from those before it."""
        x = self.embed_tokens(tokens)
        turn = _rotation(x.shape[1], self.width, x.device)
        for block in self.layers:
            x = block(x, turn)
        logits = self.lm_head(self.norm(x[:, :-1]))
        return functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


class _Block(nn.Module):
    def __init__(self, model: Model) -> None:
        super().__init__()
        h, i = model.hidden, model.inner
        self.heads, self.width = model.heads, h // model.heads
        self.self_attn = nn.ModuleDict(
            {f"{letter}_proj": nn.Linear(h, h, bias=False) for letter in "qkvo"}
        )
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(h, i, bias=False),
                "up_proj": nn.Linear(h, i, bias=False),
                "down_proj": nn.Linear(i, h, bias=False),
            }
        )
        self.input_layernorm = nn.RMSNorm(h, eps=1e-6)
        self.post_attention_layernorm = nn.RMSNorm(h, eps=1e-6)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        seen = self.input_layernorm(x)
        shape = (*x.shape[:2], self.heads, self.width)
        q, k, v = (
            self.self_attn[f"{letter}_proj"](seen).view(shape).transpose(1, 2) for letter in "qkv"
        )
        mixed = functional.scaled_dot_product_attention(
            _turned(q, turn), _turned(k, turn), v, is_causal=True
        )
        x = x + self.self_attn["o_proj"](mixed.transpose(1, 2).flatten(2))
        seen = self.post_attention_layernorm(x)
        gated = functional.silu(self.mlp["gate_proj"](seen)) * self.mlp["up_proj"](seen)
        found: Tensor = x + self.mlp["down_proj"](gated)
        return found


def _rotation(length: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions, L x (width / 2)."""
    half = torch.arange(0, width, 2, device=device, dtype=torch.float32)
    speeds = 10000.0 ** (-half / width)
    angles = torch.arange(length, device=device, dtype=torch.float32)[:, None] * speeds
    return angles.cos(), angles.sin()


def _turned(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    cosines, sines = (t.to(x.dtype) for t in turn)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cosines - second * sines, second * cosines + first * sines), dim=-1)


class _Hugging(nn.Module):
    """transformers' model with the same call."""

    def __init__(self, model: Model, length: int) -> None:
        super().__init__()
        transformers: Any = importlib.import_module("transformers")
        config = transformers.LlamaConfig(
            vocab_size=model.vocabulary,
            hidden_size=model.hidden,
            intermediate_size=model.inner,
            num_hidden_layers=model.layers,
            num_attention_heads=model.heads,
            max_position_embeddings=length,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
            use_cache=False,
        )
        self.network = transformers.LlamaForCausalLM(config)

    def forward(self, tokens: Batch) -> Tensor:
        """See `Plain`."""
        loss: Tensor = self.network(input_ids=tokens, labels=tokens, use_cache=False).loss
        return loss


def llama(model: Model, device: torch.device, length: int) -> tuple[nn.Module, str]:
    """A LLaMA in bf16, made on its device.

    Args:
        model: shapes.
        device: where.
        length: tokens of a sequence.

    Returns:
        The model, and which one it is: "transformers VERSION", or "plain torch (WHY)".
    """
    former = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            if importlib.util.find_spec("transformers") is None:
                return Plain(model), "plain torch (transformers is not installed)"
            try:
                found = _Hugging(model, length)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                return Plain(model), f"plain torch ({type(error).__name__}: {str(error)[:200]})"
            version = importlib.import_module("transformers").__version__
            return found, f"transformers {version}"
    finally:
        torch.set_default_dtype(former)
