"""What stands for your model and your data in the examples: a LLaMA of 0.1M parameters that counts.

A row goes up in steps of 1, 2 or 3, modulo the vocabulary. Needs `pip install transformers`.
"""

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 64


def language_model(seed: int = 0) -> LlamaForCausalLM:
    """A LLaMA made from its configuration; nothing is downloaded."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def rows(
    step: int, count: int = 16, length: int = 24, strides: tuple[int, ...] = (1, 2, 3)
) -> Tensor:
    """Tokens, (count, length), drawn anew for each step."""
    generator = torch.Generator().manual_seed(step)
    start = torch.randint(0, VOCABULARY, (count, 1), generator=generator)
    chosen = torch.randint(0, len(strides), (count, 1), generator=generator)
    return (start + torch.tensor(strides)[chosen] * torch.arange(length)) % VOCABULARY


def batch(step: int, count: int = 16, strides: tuple[int, ...] = (1, 2, 3)) -> dict[str, Tensor]:
    """The keyword arguments of a causal language model."""
    tokens = rows(step, count, strides=strides)
    return {"input_ids": tokens, "labels": tokens}


def dataset(size: int = 640) -> list[dict[str, Tensor]]:
    """The same as a list of examples, for trainers that make batches themselves."""
    return [{"input_ids": row, "labels": row} for row in rows(0, size)]
