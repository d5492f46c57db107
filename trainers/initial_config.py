"""What else the folder of first weights says of them: its configuration and its tokenizer."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from .data import Tokenizer
from .missing import require

_TOKENIZER = "tokenizer.json"
#: Settings that change what a network computes from the same weights.
_MEANING = (
    "hidden_act",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "attention_bias",
    "mlp_bias",
    "tie_word_embeddings",
    "sliding_window",
)
#: What a configuration needs to be read, too.
_READ = ("hidden_size", "max_position_embeddings", "rope_theta", "rope_scaling", "rope_parameters")


def warn_of_config(network: nn.Module, folder: Path) -> None:
    """Warns of a checkpoint whose config.json gives its weights another meaning than a network's.

    Args:
        network: a model of `transformers`.
        folder: of the checkpoint; without a config.json that can be read nothing is said.
    """
    content = _read(folder / "config.json")
    own: Any = network.config
    said, here = _meaning(_normal(content, type(own)), content), _meaning(own.to_dict())
    if "model_type" in content:
        said, here = _of_type(content["model_type"], said), _of_type(own.model_type, here)
    wrong = [key for key, value in said.items() if value != here.get(key)]
    if wrong:
        listed = ", ".join(f"{key}={said[key]} (here {here.get(key)})" for key in wrong)
        warnings.warn(
            f"model.initial={str(folder)!r}: its config.json says {listed}; the same weights mean"
            " something else here",
            stacklevel=2,
        )


def warn_of_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Warns of a checkpoint whose tokenizer gives a run's ids another meaning.

    Args:
        tokenizer: the run's.
        folder: of the checkpoint; without a tokenizer.json that can be read nothing is said.
    """
    theirs = _tokens(folder)
    if not theirs:
        return
    with TemporaryDirectory() as place:
        tokenizer.save(Path(place))
        own = _tokens(Path(place))
    wrong = sum(1 for number, token in own.items() if theirs.get(number) != token)
    if wrong:
        warnings.warn(
            f"model.initial={str(folder)!r} has another tokenizer: {wrong:,} of the {len(own):,}"
            f" ids that this run's has mean another token there, or none; data.tokenizer={folder}"
            " takes that one",
            stacklevel=2,
        )


def _read(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file; an empty one where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _normal(content: Mapping[str, Any], kind: Any) -> dict[str, Any]:
    """A configuration's own settings as `kind` has them, which knows older names of them."""
    known = {key: content[key] for key in (*_MEANING, *_READ) if key in content}
    try:
        full: dict[str, Any] = kind.from_dict(json.loads(json.dumps(known))).to_dict()
    except Exception:  # what its checks raise for values of another kind has many types
        return known
    rope = {"rope_parameters": full.get("rope_parameters")} if known else {}
    return {**{key: full.get(key, known[key]) for key in known if key in _MEANING}, **rope}


def _meaning(
    content: Mapping[str, Any], written: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The settings that count; the rotary embedding's base apart, whatever form it is given in.

    Args:
        content: a configuration.
        written: the same as its file has it, whose own `rope_theta` counts.
    """
    found = {key: content[key] for key in _MEANING if key in content}
    rope = content.get("rope_parameters") or content.get("rope_scaling")
    rope = rope if isinstance(rope, dict) else {}
    rest = {key: value for key, value in rope.items() if key not in ("rope_theta", "type")}
    theta = (written or content).get("rope_theta") or rope.get("rope_theta")
    found |= {} if theta is None else {"rope_theta": theta}
    return found | ({"rope_parameters": rest} if rest else {})


def _of_type(name: object, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings, and before them the kind of network that they are of."""
    return {"model_type": name, **settings}


def _tokens(folder: Path) -> dict[int, str]:
    """The tokens of the tokenizer in a folder, by id; none where there is none to be read."""
    path = folder / _TOKENIZER
    if not path.is_file():
        return {}
    try:
        backend = require("tokenizers", "train").Tokenizer.from_file(str(path))
    except Exception:  # the library raises bare Exception
        return {}
    return {number: token for token, number in backend.get_vocab().items()}
