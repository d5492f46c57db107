"""Any Hugging Face tokenizer, by name or from a folder."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..missing import require
from .errors import first_line

#: Seconds before the hub is asked a second time, and for which an answer is awaited.
_WAIT, _TIMEOUT = 2.0, 10.0


class PretrainedTokenizer:
    """A tokenizer from ``transformers.AutoTokenizer``.

    Its vocabulary size counts what text can become: t5-base, whose 100 sentinel tokens lie above
    its 32,000 pieces, fits a model with a vocabulary of 32,000, as the papers use it.

    Args:
        name: Name on the Hugging Face hub, or a local folder.

    Raises:
        ValueError: If it can't be loaded, isn't a fast tokenizer, or has no token that ends a text.
    """

    def __init__(self, name: str) -> None:
        self._wrapper = _load(name)
        backend = getattr(self._wrapper, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(
                f"the tokenizer {name!r} is {type(self._wrapper).__name__}, which has no fast "
                "version; choose one that has"
            )
        self._name = name
        self._prepare()

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self._name, "wrapper": self._wrapper}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._name, self._wrapper = state["name"], state["wrapper"]
        self._prepare()

    def _prepare(self) -> None:
        wrapper = self._wrapper
        tokenizers = require("tokenizers", "train")
        serialized = wrapper.backend_tokenizer.to_str()
        # A copy: what is set here must not be saved with the original.
        self._backend = tokenizers.Tokenizer.from_str(serialized)
        self._backend.no_padding()
        self._backend.no_truncation()
        self._backend.encode_special_tokens = True
        ends = (wrapper.eos_token_id, wrapper.sep_token_id)
        eos_id = next((token for token in ends if token is not None), None)
        if eos_id is None:
            raise ValueError(
                f"the tokenizer {self._name!r} has neither an end-of-text nor a separator token"
            )
        self.eos_id: int = eos_id
        special = set(wrapper.all_special_ids)
        special.update(
            token
            for token, added in self._backend.get_added_tokens_decoder().items()
            if added.special
        )
        plain = (token for token in self._backend.get_vocab().values() if token not in special)
        self.vocabulary_size: int = 1 + max(eos_id, max(plain, default=0))
        unknown = wrapper.unk_token_id
        inside = unknown is not None and unknown < self.vocabulary_size
        self._unknown: int = unknown if inside else eos_id
        self.fingerprint = "hf-" + hashlib.sha256(serialized.encode()).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """The text's token ids."""
        return self._inside(self._backend.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Each text's token ids."""
        found = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [self._inside(encoding.ids) for encoding in found]

    def encode_with_bytes(self, text: str) -> tuple[list[int], list[int]]:
        """The text's token ids, and the bytes up to each one's end less those before it.

        A character that takes several tokens counts with its first, what normalisation drops at the
        end with the last.
        """
        encoding = self._backend.encode(text, add_special_tokens=False)
        counts = []
        done = 0
        for _, end in encoding.offsets:
            counts.append(len(text[done:end].encode()))
            done = max(done, end)
        if counts:
            counts[-1] += len(text[done:].encode())
        return self._inside(encoding.ids), counts

    def save(self, folder: Path) -> None:
        """Write the tokenizer's own files."""
        self._wrapper.save_pretrained(str(folder))

    def _inside(self, ids: list[int]) -> list[int]:
        # A sentinel that a document happens to spell out may still be a piece of the model.
        if ids and max(ids) >= self.vocabulary_size:
            return [token if token < self.vocabulary_size else self._unknown for token in ids]
        return ids


def _reach(name: str) -> None:
    """Asks the hub for a tokenizer's repository, without the retries of each file's download.

    Those add up to more than a minute where there is no network. Raises what the network raises;
    what the hub answers, whatever it is, is left to the download.
    """
    hub = require("huggingface_hub", "train")
    for wait in (_WAIT, None):
        try:
            hub.HfApi().model_info(name, timeout=_TIMEOUT)
        except (hub.errors.HfHubHTTPError, hub.errors.HFValidationError):
            return
        except Exception as error:  # Which type the network's errors have is no stable fact.
            if wait is None or "Offline" in type(error).__name__:
                raise
            time.sleep(wait)
        else:
            return


def _load(name: str) -> Any:
    transformers = require("transformers", "train")
    try:
        try:
            # What was fetched once needs no network again, and stays the same through a run's life.
            return transformers.AutoTokenizer.from_pretrained(name, local_files_only=True)
        except Exception:
            if not Path(name).expanduser().is_dir():
                _reach(name)
            return transformers.AutoTokenizer.from_pretrained(name)
    except Exception as error:  # The library and the network below it raise many types.
        place = "the folder" if Path(name).expanduser().is_dir() else "no such folder, and the hub"
        raise ValueError(
            f"the tokenizer {name!r} can't be loaded: {place} gave no tokenizer "
            f"({first_line(error)}); 'bpe' and 'bytes' need no download"
        ) from error
