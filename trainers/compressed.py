"""Compressed checkpoints: factors in place of low-rank matrices, written and read again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from lowrank.optimizers import WeightCompression, compress_weights, load_compressed

from .files import WEIGHTS, write_text, writing
from .missing import require
from .run_folder import store_of

#: The whole model's tensors, factors among them.
FACTORED = "factored.safetensors"
#: What became of each matrix.
RECORD = "compression.json"
#: Files of a checkpoint that are about its dense weights or its run.
_LEFT = (WEIGHTS, "layers.safetensors", "optimizer.pt", "trainer.pt", "manifest.json", RECORD)


def compress(checkpoint: Path, output: Path, **options: Any) -> WeightCompression:
    """Writes a compressed copy of a checkpoint.

    Args:
        checkpoint: a checkpoint's folder (a run's or Hugging Face's, with `model.safetensors` and
            `config.json`), or a run's, whose best checkpoint is meant.
        output: a folder that is new or empty; it is there only once all is written.
        **options: of `compress_weights`.

    Raises:
        ValueError: the folders or the options are not accepted.
        MissingExtraError: `transformers` or `safetensors` is not installed.
        WriteError: a file can't be written.
    """
    source = _checkpoint(checkpoint)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output {output} is there already: accepted is a new or empty folder")
    network = _network(source)
    network.load_state_dict(require("safetensors.torch", "train").load_file(source / WEIGHTS))
    done = compress_weights(network, **options)
    temporary = output.with_name(f".{output.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with writing(temporary):
            temporary.mkdir(parents=True)
        tensors = {name: value.contiguous() for name, value in network.state_dict().items()}
        with writing(temporary / FACTORED):
            require("safetensors.torch", "train").save_file(
                tensors, temporary / FACTORED, metadata={"format": "pt"}
            )
            (temporary / FACTORED).chmod(0o644)
        write_text(temporary / RECORD, json.dumps(done.to_dict(), indent=1) + "\n")
        for path in sorted(source.iterdir()):
            if path.is_file() and path.name not in _LEFT:
                with writing(temporary / path.name):
                    shutil.copyfile(path, temporary / path.name)
        if output.exists():
            output.rmdir()
        temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return done


def load(folder: Path, *, freeze: bool = True) -> nn.Module:
    """The network that `compress` wrote, on the CPU.

    Args:
        folder: its output.
        freeze: leave only factors with `requires_grad`: `build("low_rank_adamw", network)` then
            fine-tunes what is low-rank alone.

    Raises:
        ValueError: the folder isn't one of its outputs.
    """
    if not (folder / FACTORED).is_file():
        raise ValueError(f"{folder} has no {FACTORED}: accepted is what lowrank compress wrote")
    state = require("safetensors.torch", "train").load_file(folder / FACTORED)
    return load_compressed(_network(folder), state, freeze=freeze)


def lines(done: WeightCompression) -> list[str]:
    """A line for each matrix, and one for all."""
    width = max(len(own.name) for own in done.matrices)
    shown = [
        f"{own.name:{width}}  {own.rows} x {own.columns}  rank {own.rank:5} of "
        f"{min(own.rows, own.columns)}  "
        + (f"factored, error {own.error:.3f}" if own.low_rank else "dense")
        for own in done.matrices
    ]
    factored = sum(own.low_rank for own in done.matrices)
    return [
        *shown,
        f"threshold {done.threshold:.4g}: ranks less {done.reduction:.1%}; {factored} of "
        f"{len(done.matrices)} matrices are factors now, {done.entries:.1%} of the entries left",
    ]


def _checkpoint(folder: Path) -> Path:
    if (folder / WEIGHTS).is_file():
        return folder
    if (folder / "checkpoints").is_dir():
        store = store_of(folder)
        found = store.best() or store.newest(lambda text: None)
        if found is not None:
            return found.folder
    raise ValueError(
        f"{folder} has no {WEIGHTS} and no checkpoints: accepted is a run's folder, or the folder "
        "of a checkpoint"
    )


def _network(folder: Path) -> Any:
    """A network of a checkpoint's shape and dtype, whose weights are to be loaded."""
    transformers = require("transformers", "train")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: accepted is a checkpoint of Hugging Face's")
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    return transformers.AutoModelForCausalLM.from_config(config)
