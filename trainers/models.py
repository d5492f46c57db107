"""The LLaMA that is trained: built by `transformers`, with our chunked loss on top."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.optimizers import Compression, QuantizedWeight

from .config import ModelConfig
from .loss import chunked_cross_entropy
from .missing import require
from .recompute import recompute_between_products


class LanguageModel(nn.Module):
    """A `LlamaForCausalLM` whose forward pass returns the summed loss instead of logits.

    `network` is the Hugging Face model itself: its parameter names are what optimizers and
    checkpoints see.
    """

    def __init__(self, network: Any, autocast: bool = False) -> None:
        super().__init__()
        self.network = network
        self.autocast = autocast
        self.compression: Compression | None = None

    def begin_step(self, step: int) -> None:
        """Tells layers that draw random numbers how many optimizer steps were taken."""
        if self.compression is not None:
            self.compression.step = step

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The loss in nats, summed over the targets that count.

        Args:
            inputs: (B, L) int64 token numbers.
            targets: (B, L) int64 numbers of the tokens that follow; -100 where none is predicted.
        """
        head = self.network.lm_head.weight
        return summed_loss(self.network.model, head, inputs, targets, self.autocast)


def summed_loss(
    decoder: nn.Module, head: Tensor, inputs: Tensor, targets: Tensor, autocast: bool
) -> Tensor:
    """The loss of a decoder and an output head, in nats, summed over the targets that count.

    Args:
        decoder: from token numbers to hidden states, a model of `transformers`.
        head: (V, d) weight.
        inputs: (B, L) int64 token numbers.
        targets: (B, L) int64 numbers of the tokens that follow; -100 where none is predicted.
        autocast: whether products are in bfloat16 whatever the weights are in; else as they are
            where this is called.
    """
    half = torch.bfloat16
    with torch.autocast(inputs.device.type, half) if autocast else contextlib.nullcontext():
        hidden = decoder(input_ids=inputs, use_cache=False).last_hidden_state
    if autocast:  # here, because it doesn't reach into the loss's own passes
        hidden = hidden.to(half)
        head = head if isinstance(head, QuantizedWeight) else head.to(half)
    return chunked_cross_entropy(hidden, head, targets)


def build_model(
    config: ModelConfig, sequence_length: int, seed: int, device: torch.device
) -> LanguageModel:
    """A freshly initialised model; the same seed gives the same weights on every device.

    Args:
        config: shape, dtype and activation checkpointing.
        sequence_length: longest input in tokens.
        seed: seeds torch's generator, and so the random numbers after it.
        device: of the weights.

    Raises:
        MissingExtraError: `transformers` is not installed.
    """
    network = new_network(config, sequence_length, seed)
    dtype = getattr(torch, config.dtype)
    for parameter in network.parameters():
        # The weights alone: rotary frequencies in bfloat16 would blur the positions, and
        # from_pretrained keeps them in float32 too.
        parameter.data = parameter.data.to(dtype)
    network.to(device=device)
    return prepared(network, config)


def new_network(config: ModelConfig, sequence_length: int, seed: int) -> Any:
    """A new `transformers.LlamaForCausalLM` in float32, initialised after seeding torch.

    Raises:
        MissingExtraError: `transformers` is not installed.
    """
    transformers = require("transformers", "train")
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(network_config(config, sequence_length))


def prepared(network: Any, config: ModelConfig) -> LanguageModel:
    """The network ready for training, inside a `LanguageModel`; its dtype and place are set."""
    # from_pretrained reads the dtype from here
    network.config.dtype = getattr(torch, config.dtype)
    network.train()
    if config.activation_checkpointing:
        checkpoint_activations(network, compiled=config.compile)
    if config.compile:
        network.model.compile()
    return LanguageModel(network, config.autocast)


def checkpoint_activations(network: Any, *, compiled: bool = False) -> None:
    """Recomputes each block in the backward pass, and in a block what is between its products.

    Args:
        network: a model of `transformers`.
        compiled: it will be compiled: what is kept in a block is the compiler's choice.
    """
    # newer versions gave the switch a new name
    enable = getattr(network, "activation_checkpointing_enable", None)
    (enable or network.gradient_checkpointing_enable)({"use_reentrant": False})
    if not compiled:
        recompute_between_products(network)


def network_config(config: ModelConfig, sequence_length: int) -> Any:
    """The `transformers.LlamaConfig` of a model.

    Special tokens are not set: the tokenizer saved with the weights defines them.
    """
    transformers = require("transformers", "train")
    return transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        max_position_embeddings=sequence_length,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        hidden_act="silu",
        initializer_range=config.initializer_range,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        use_cache=True,
    )


def parameter_count(model: nn.Module) -> int:
    """Number of trained parameters, every shared tensor once."""
    # Stage 3 of ZeRO leaves a parameter no entries of its own.
    return sum(getattr(item, "ds_numel", item.numel()) for item in model.parameters())
