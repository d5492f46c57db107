"""The model that is planned: shapes alone, from a preset or a Hugging Face configuration."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn

from ..config import DTYPES, ModelConfig
from ..config_io import from_mapping, nearest
from ..missing import require
from ..models import network_config, summed_loss
from ..preset import preset_layer, preset_names

#: Attributes of a block, beside its shapes, by which models tell unequal blocks apart.
_KINDS = ("attention_type", "layer_type", "is_sliding", "block_type")

#: Most letters of another library's error message.
LONGEST_REASON = 400


@dataclass(frozen=True)
class Source:
    """What a model is made from.

    Attributes:
        name: of the preset, or the configuration's path.
        config: a `transformers` configuration.
        dtype: of weights, gradients and activations.
        checkpointing: whether each block is recomputed in the backward pass.
        autocast: whether products are in bfloat16 all the same.
    """

    name: str
    config: Any
    dtype: torch.dtype
    checkpointing: bool
    autocast: bool = False


class Network(nn.Module):
    """A causal language model whose forward pass returns the trainer's chunked loss."""

    def __init__(self, network: Any, autocast: bool = False) -> None:
        super().__init__()
        self.network = network
        self.autocast = autocast

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The summed loss; see `LanguageModel`."""
        decoder, head = self.network.base_model, self.network.get_output_embeddings()
        return summed_loss(decoder, head.weight, inputs, targets, self.autocast)


def read_source(
    model: str,
    sequence: int,
    dtype: str | None = None,
    checkpointing: bool | None = None,
    autocast: bool = False,
) -> Source:
    """Reads a preset or a configuration file.

    Args:
        model: a preset's name, or the path of a `config.json` or of a folder with one.
        sequence: tokens of a sequence.
        dtype: "float32" or "bfloat16"; None for the model's own.
        checkpointing: None for the preset's choice, off for configuration files.
        autocast: products in bfloat16 over weights in float32.

    Raises:
        ValueError: there is no such preset or file, it isn't that of a causal language model, or
            the dtype is another one, or not float32 with `autocast`.
        MissingExtraError: `transformers` is not installed.
    """
    source = _source(model, sequence, dtype, checkpointing)
    if autocast and source.dtype != torch.float32:
        raise ValueError(
            f"autocast=True with dtype={str(source.dtype).removeprefix('torch.')!r}: accepted is "
            "'float32'"
        )
    return replace(source, autocast=autocast)


def _source(model: str, sequence: int, dtype: str | None, checkpointing: bool | None) -> Source:
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: accepted are {', '.join(DTYPES)}")
    path = Path(model)
    if model in preset_names():
        shape: ModelConfig = from_mapping(preset_layer(model, "adamw")).model
        kept = shape.activation_checkpointing if checkpointing is None else checkpointing
        config = network_config(shape, sequence)
        return Source(model, config, getattr(torch, dtype or shape.dtype), kept)
    if not (path.exists() or os.sep in model or model.endswith(".json")):
        raise ValueError(
            f"model={model!r}: {nearest(model, preset_names())}, or the path of a config.json"
        )
    config = _read_config(path)
    own = getattr(config, "dtype", None)
    narrow = own in (torch.bfloat16, torch.float16) or own is None
    chosen = getattr(torch, dtype) if dtype else torch.bfloat16 if narrow else torch.float32
    return Source(model, config, chosen, bool(checkpointing))


def _read_config(path: Path) -> Any:
    transformers = require("transformers", "train")
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"model={str(path)!r}: there is no file {file}")
    try:
        config = transformers.AutoConfig.from_pretrained(str(file), local_files_only=True)
    except Exception as error:  # of many types, for files that are not what they should be
        raise ValueError(
            f"model={str(path)!r}: {file} is no configuration that transformers "
            f"{transformers.__version__} knows ({_reason(error)})"
        ) from None
    mapping = transformers.AutoModelForCausalLM._model_mapping
    if type(config) not in mapping:
        raise ValueError(
            f"model={str(path)!r}: {type(config).__name__} ({config.model_type}) is not that of a "
            "causal language model; accepted are those of AutoModelForCausalLM"
        )
    return config


def _reason(error: Exception) -> str:
    """What an error says in its first paragraph, on one line."""
    paragraph = str(error).strip().split("\n\n")[0]
    return shorten(paragraph, LONGEST_REASON, placeholder=" ...") or type(error).__name__


def new_network(source: Source, device: torch.device) -> Network:
    """The model in training mode, initialised as its configuration says; "meta" gives shapes.

    Raises:
        ValueError: the model can't be made from its configuration, or has no output head.
    """
    transformers = require("transformers", "train")
    try:
        with torch.random.fork_rng(devices=[]), device, _silent(transformers):
            network = transformers.AutoModelForCausalLM.from_config(
                source.config, attn_implementation="sdpa", dtype=source.dtype
            )
    except Exception as error:  # of many types, for sizes that no model has
        raise ValueError(f"model={source.name!r} can't be made: {_reason(error)}") from None
    if not isinstance(getattr(network.get_output_embeddings(), "weight", None), Tensor):
        raise ValueError(
            f"model={source.name!r}: {type(network).__name__} has no linear output head; accepted "
            "are models with one"
        )
    network.train()
    return Network(network, source.autocast)


@contextlib.contextmanager
def _silent(transformers: Any) -> Iterator[None]:
    logging = transformers.utils.logging
    former = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(former)


def place(model: nn.Module, device: torch.device) -> None:
    """In place: gives the tensors of a meta model another device; under `FakeTensorMode` fakes."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for name, param in list(module._parameters.items()):
            if param is not None:
                if id(param) not in made:
                    empty = torch.empty(param.shape, dtype=param.dtype, device=device)
                    made[id(param)] = nn.Parameter(empty, param.requires_grad)
                module._parameters[name] = made[id(param)]  # type: ignore[assignment]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                if id(buffer) not in made:
                    made[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
                module._buffers[name] = made[id(buffer)]


@dataclass(frozen=True)
class Blocks:
    """A model's repeated blocks.

    Attributes:
        parent: the module that holds the list.
        name: of the list in it.
        items: the blocks.
        equal: whether all have the same shapes and kind.
    """

    parent: nn.Module
    name: str
    items: tuple[nn.Module, ...]
    equal: bool

    @contextlib.contextmanager
    def first(self, count: int) -> Iterator[None]:
        """The model with its first blocks only."""
        whole = self.parent._modules[self.name]
        self.parent._modules[self.name] = nn.ModuleList(self.items[:count])
        try:
            yield
        finally:
            self.parent._modules[self.name] = whole


def find_blocks(model: nn.Module) -> Blocks | None:
    """The longest list of blocks with parameters, or None."""
    lists = [
        (parent, name, tuple(child))
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.ModuleList) and any(True for _ in child.parameters())
    ]
    if not lists:
        return None
    parent, name, items = max(lists, key=lambda entry: len(entry[2]))
    return Blocks(parent, name, items, len({_signature(block) for block in items}) == 1)


def _signature(block: nn.Module) -> tuple[Any, ...]:
    shapes = tuple((name, tuple(p.shape)) for name, p in block.named_parameters())
    kinds = tuple(
        str(getattr(module, kind)) for module in block.modules() for kind in _KINDS
        if hasattr(module, kind)
    )  # fmt: skip
    return type(block), shapes, kinds
