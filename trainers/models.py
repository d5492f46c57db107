"""The LLaMA that is trained: built by `transformers`, with our chunked loss on top."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.optimizers import Compression, QuantizedWeight

from .config import ModelConfig
from .first_weights import FirstWeights, fill
from .initial import initial_values
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
    config: ModelConfig,
    sequence_length: int,
    seed: int,
    device: torch.device,
    quantise: Callable[[nn.Module], object] | None = None,
) -> LanguageModel:
    """A model with its first weights; the same seed gives the same ones on every device.

    There is never more than one dense parameter besides those that are ready, in float32 on the CPU
    and in the model's dtype on the device.

    Args:
        config: shape, dtype, activation checkpointing, and the checkpoint to begin with, if any.
        sequence_length: longest input in tokens.
        seed: seeds torch's generator, and so the random numbers after it.
        device: of the weights.
        quantise: converts a network on the meta device whose weights are to be quantised.

    Raises:
        MissingExtraError: `transformers` is not installed.
        ValueError: `config.initial` is no checkpoint, or one of another shape.
    """
    network, first = unfilled_network(config, sequence_length, seed, device)
    if quantise is not None:
        quantise(network)
    fill(network, first_values(network, first, config), device)
    return prepared(network, config)


def unfilled_network(
    config: ModelConfig, sequence_length: int, seed: int, device: torch.device
) -> tuple[Any, FirstWeights]:
    """A new network, and what its parameters' values are; these are on the meta device.

    Parameters have the model's dtype, buffers are on `device`. Torch's generator is then where a
    whole initialisation leaves it.
    """
    with FirstWeights() as first:
        network = new_network(config, sequence_length, seed)
    first.name(network)
    dtype = getattr(torch, config.dtype)
    for parameter in network.parameters():
        # The weights alone: rotary frequencies in bfloat16 would blur the positions, and
        # from_pretrained keeps them in float32 too.
        parameter.data = parameter.data.to(dtype)
    for module in network.modules():
        for name, buffer in module.named_buffers(recurse=False):
            lasting = name not in module._non_persistent_buffers_set
            module.register_buffer(name, buffer.to(device), lasting)
    return network, first


def first_values(
    network: nn.Module, first: FirstWeights, config: ModelConfig
) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
    """Name, parameter and whole value of each: a checkpoint's if `config.initial` names one."""
    if config.initial:
        return initial_values(network, Path(config.initial))
    return first.values(network)


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
