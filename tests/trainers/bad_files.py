"""Inputs whose files or folders are wrong: configurations, data, checkpoints, models, runs."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from bad_inputs import DATA, PLACE, RUN, BadInput

Make = Callable[[Path], None]
RAW = bytes(range(256)) * 8
LAST = "step-00000004"


def _bytes(data: bytes) -> Make:
    return lambda path: _write(path, data)


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


def _dangling(path: Path) -> None:
    path.symlink_to("nothing-there")


def _pipe(path: Path) -> None:
    os.mkfifo(path)


_BOMB = "log: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{','.join([f'*{chr(97 + n)}'] * 9)}]\n" for n in range(9)
)

#: Contents of a configuration file.
CONFIGURATIONS: dict[str, Make] = {
    "missing": lambda path: None,
    "a folder": lambda path: path.mkdir(),
    "a symlink loop": _loop,
    "dangling": _dangling,
    "binary": _bytes(RAW),
    "UTF-16": _bytes("train: {max_skips: 1}".encode("utf-16")),
    "Latin-1": _bytes("data: {source: 'dép\xf4t'}".encode("latin-1")),
    "torn": _bytes(b"train: {max_skips: 1, cl"),
    "a list": _bytes(b"- 1\n- 2\n"),
    "a number": _bytes(b"5"),
    "text": _bytes(b"just words"),
    "tabs": _bytes(b"train:\n\tmax_skips: 1\n"),
    "two documents": _bytes(b"train: {max_skips: 1}\n---\nmodel: {}\n"),
    "a key twice": _bytes(b"train: {max_skips: 1, max_skips: 2}\n"),
    "a section twice": _bytes(b"train: {max_skips: 1}\ntrain: {clip: 2}\n"),
    "deep": _bytes(b"train: " + b"[" * 3000 + b"]" * 3000),
    "aliases of aliases": _bytes(f"{_BOMB}train: {{max_skips: *j}}\n".encode()),
    "a Python object": _bytes(b"train: {max_skips: !!python/object/apply:os.getcwd []}"),
    "an unknown tag": _bytes(b"train: {max_skips: !thing 5}"),
    "null bytes": _bytes(b"train: {max_skips: 1}\0\0"),
    "a null in a path": _bytes(b'model: {initial: "a\\0b"}'),
    "a null in a name": _bytes(b'model: {name: "a\\0b"}'),
    "a surrogate": _bytes(b'model: {initial: "\\ud800"}'),
    "a section that is text": _bytes(b"train: many\n"),
    "keys that are numbers": _bytes(b"train: {1: 2}\n"),
    "keys that are lists": _bytes(b"? [1, 2]\n: 3\n"),
    "JSON with a comma too many": _bytes(b'{"train": {"steps": 1,,}}'),
    "an anchor in itself": _bytes(b"train: &a {max_skips: *a}\n"),
    "a merge of nothing": _bytes(b"train: {<<: 5}\n"),
    "a date": _bytes(b"train: {max_skips: 2026-01-01}\n"),
    "a wrong base": _bytes(b"train: {max_skips: 0x}\n"),
    "a date that isn't": _bytes(b"train: {max_skips: 2026-13-45}\n"),
    "huge digits": _bytes(b"train: {max_skips: " + b"9" * 6000 + b"}\n"),
    "an integer of colons": _bytes(b"train: {max_skips: 1:99:99:99:99}\n"),
}


def _data(name: str, data: bytes | None, validation: bool = True) -> Make:
    def make(folder: Path) -> None:
        folder.mkdir()
        if data is not None:
            _write(folder / name, data)
        if validation:
            _write(folder / "val.txt", b"some words to validate on")

    return make


def _odd(make: Make, name: str) -> Make:
    def inside(folder: Path) -> None:
        folder.mkdir()
        make(folder / name)

    return inside


_GOOD = b"".join(json.dumps({"text": f"words of document {n}"}).encode() + b"\n" for n in range(9))
#: Data folders.
DATA_FOLDERS: dict[str, Make] = {
    "missing": lambda path: None,
    "a file": _bytes(_GOOD),
    "a symlink loop": _loop,
    "dangling": _dangling,
    "a pipe": _pipe,
    "empty": lambda path: path.mkdir(),
    "of hidden files": _data(".train.txt", b"words", validation=False),
    "of other files": _data("train.csv", b"a,b\n", validation=False),
    "of folders that look like files": _odd(lambda path: path.mkdir(), "train.txt"),
    "of links to themselves": _odd(_loop, "train.txt"),
    "of dangling links": _odd(_dangling, "train.jsonl"),
    "of pipes": _odd(_pipe, "train.txt"),
    "an empty file": _data("train.txt", b""),
    "blank": _data("train.txt", b" \n\n \n"),
    "torn gzip": _data("train.json.gz", gzip.compress(_GOOD * 50)[:40]),
    "gzip cut in the middle": _data("train.json.gz", gzip.compress(RAW * 999)[:900]),
    "no gzip": _data("train.json.gz", _GOOD),
    "an empty gzip": _data("train.json.gz", b""),
    "gzip of binary": _data("train.json.gz", gzip.compress(RAW)),
    "no field": _data("train.jsonl", b'{"body": "a"}\n' * 5),
    "a field of numbers": _data("train.jsonl", b'{"text": 5}\n' * 5),
    "a field of lists": _data("train.jsonl", b'{"text": ["a"]}\n' * 5),
    "torn JSON": _data("train.jsonl", b'{"text": "a\n' * 5),
    "JSON lists": _data("train.jsonl", b"[1, 2]\n" * 5),
    "one JSON array": _data("train.jsonl", json.dumps([{"text": "a"}] * 5, indent=1).encode()),
    "JSON numbers": _data("train.jsonl", b"5\n" * 5),
    "deep JSON": _data("train.jsonl", b"[" * 100_000 + b"\n"),
    "empty texts": _data("train.jsonl", b'{"text": ""}\n' * 5),
    "UTF-16 without a mark": _data("train.jsonl", _GOOD.decode().encode("utf-16-le")),
    "Latin-1 JSON": _data("train.jsonl", '{"text": "d\xe9p\xf4t"}\n'.encode("latin-1") * 5),
    "binary text": _data("train.txt", RAW),
    "binary JSON": _data("train.jsonl", RAW),
    "no parquet": _data("train.parquet", b"PAR1 and not more"),
    "an empty parquet": _data("train.parquet", b""),
    "torn parquet": _data("train.parquet", b"PAR1" + RAW + b"PAR1"),
    "validation that is binary": _odd(_bytes(RAW), "val.jsonl"),
    "training that is missing": _data("train.csv", b""),
}

#: Files of a model's configuration for `plan`.
MODELS: dict[str, Make] = {
    "a folder": lambda path: path.mkdir(),
    "binary": _bytes(RAW),
    "empty": _bytes(b""),
    "torn": _bytes(b'{"model_type": "llama", "hidden_'),
    "a list": _bytes(b"[1]"),
    "without a type": _bytes(b"{}"),
    "of an unknown type": _bytes(b'{"model_type": "no-such-model"}'),
    "with sizes of text": _bytes(b'{"model_type": "llama", "hidden_size": "big"}'),
    "with a size of zero": _bytes(b'{"model_type": "llama", "hidden_size": 0}'),
    "with a negative size": _bytes(b'{"model_type": "llama", "num_hidden_layers": -3}'),
    "with heads that don't divide": _bytes(
        b'{"model_type": "llama", "hidden_size": 30, "num_attention_heads": 7}'
    ),
    "a symlink loop": _loop,
    "UTF-16": _bytes('{"model_type": "llama"}'.encode("utf-16")),
    "with NaN": _bytes(b'{"model_type": "llama", "hidden_size": NaN}'),
    "deep": _bytes(b"[" * 100_000),
}


def _altered(change: Callable[[Path], None]) -> Callable[[Path, Path], None]:
    """A finished run, and something wrong in it."""

    def make(place: Path, run: Path) -> None:
        shutil.copytree(run, place / "run")
        change(place / "run")

    return make


def _every(name: str, change: Make) -> Callable[[Path], None]:
    """A change of one file in all checkpoints."""

    def alter(folder: Path) -> None:
        for checkpoint in (folder / "checkpoints").iterdir():
            change(checkpoint / name)

    return alter


def _resigned(name: str, data: bytes) -> Callable[[Path], None]:
    """Another content of a file in all checkpoints, of which the manifests know."""

    def alter(folder: Path) -> None:
        for checkpoint in (folder / "checkpoints").iterdir():
            (checkpoint / name).write_bytes(data)
            resign(checkpoint)

    return alter


def resign(checkpoint: Path, **changes: Any) -> None:
    """Writes a checkpoint's manifest anew."""
    path = checkpoint / "manifest.json"
    content = json.loads(path.read_text()) | changes
    content.pop("self")
    for name in content["files"]:
        data = (checkpoint / name).read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        content["files"][name] = {"bytes": len(data), "sha256": digest}
    content["self"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(content))


def _manifest(**changes: Any) -> Callable[[Path], None]:
    def alter(folder: Path) -> None:
        for checkpoint in (folder / "checkpoints").iterdir():
            resign(checkpoint, **changes)

    return alter


def _pickled(path: Path) -> None:
    """A pickle of an object, which isn't loaded, in place of tensors."""
    torch.save({"config": Path("/tmp"), "ranks": [object]}, path)
    resign(path.parent)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _gone(path: Path) -> None:
    path.unlink()


def _emptied(folder: Path) -> None:
    shutil.rmtree(folder / "checkpoints")
    (folder / "checkpoints").mkdir()


def _linked(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.symlink_to(path.name)


#: What is wrong with a run that is to be resumed.
RUNS: dict[str, Callable[[Path], None]] = {
    "no manifest": _every("manifest.json", _gone),
    "a torn manifest": _every("manifest.json", _cut),
    "a binary manifest": _every("manifest.json", _bytes(RAW)),
    "an empty manifest": _every("manifest.json", _bytes(b"")),
    "a manifest that is a list": _every("manifest.json", _bytes(b"[]")),
    "torn weights": _every("model.safetensors", _cut),
    "no weights": _every("model.safetensors", _gone),
    "torn state": _every("optimizer.pt", _cut),
    "another version": _manifest(format=99),
    "another step": _manifest(step=3),
    "a step of text": _manifest(step="4"),
    "weights that are none": _resigned("model.safetensors", RAW),
    "empty weights": _resigned("model.safetensors", b""),
    "a state that is none": _resigned("optimizer.pt", RAW),
    "counters that are none": _resigned("trainer.pt", RAW),
    "empty counters": _resigned("trainer.pt", b""),
    "objects": _every("trainer.pt", _pickled),
    "no checkpoints": _emptied,
    "a loop for checkpoints": lambda folder: _linked(folder / "checkpoints"),
    "a torn config": lambda folder: _write(folder / "config.yaml", b"train: {st"),
    "a binary config": lambda folder: _write(folder / "config.yaml", RAW),
    "a config of another method": lambda folder: _write(
        folder / "config.yaml",
        (folder / "config.yaml").read_bytes().replace(b"galore_adamw", b"fira_adamw"),
    ),
    "a config of a list": lambda folder: _write(folder / "config.yaml", b"[1]"),
}
#: Settings that are not the run's.
OTHERS = (
    *("--optimizer=fira_adamw", "--optimizer=adamw", "--steps=2", "--seed=5", "--model=llama_60m"),
    *("optimizer.rank=4", "optimizer.lr=0.1", "model.hidden_size=64", "data.sequence_length=16"),
    *("train.batch_size=3", "data.tokenizer=bpe", "train.clip=0.5", "model.dtype=bfloat16"),
)


def _resumed() -> Iterator[BadInput]:
    for name, change in RUNS.items():
        arguments = ("pretrain", f"--resume={PLACE}/run", "--device=cpu")
        yield BadInput(f"resume, {name}", arguments, _altered(change))
        if "config" in name:
            continue
        arguments = ("pretrain", f"--resume={PLACE}/run/checkpoints/{LAST}", "--device=cpu")
        yield BadInput(f"resume one, {name}", arguments, _altered(change))
    for other in OTHERS:
        given = (other,) if other.startswith("--") else ("--set", other)
        yield BadInput("resume other", ("pretrain", f"--resume={RUN}", *given))
    for where in (f"{RUN}/checkpoints/step-00000099", f"{RUN}/checkpoints", f"{RUN}/config.yaml"):
        yield BadInput("resume what", ("pretrain", f"--resume={where}"))
    yield BadInput("resume what", ("pretrain", f"--resume={RUN}", f"--output={PLACE}/else"))
    yield BadInput("resume what", ("pretrain", f"--output={RUN}", f"--data={DATA}"))
    yield BadInput("resume what", ("pretrain", f"--resume={DATA}"))
    for make in (_loop, _pipe, _dangling):
        yield BadInput(
            "resume what",
            ("pretrain", f"--resume={PLACE}/odd"),
            lambda place, run, make=make: make(place / "odd"),
        )
        yield BadInput(
            "output",
            (f"--output={PLACE}/odd",),
            lambda place, run, make=make: make(place / "odd"),
            tiny=True,
        )


def _reports() -> Iterator[BadInput]:
    for name, content in {"empty": b"", "binary": RAW, "a list": b"[]", "torn": b'{"a'}.items():
        for file, command in (
            ("comparison.json", ("report", f"{PLACE}/other")),
            ("comparison.json", ("compare", f"--output={PLACE}/other", "--methods=adamw")),
            ("config.yaml", ("report", f"{PLACE}/other")),
        ):

            def make(place: Path, run: Path, file: str = file, content: bytes = content) -> None:
                if file == "config.yaml":
                    shutil.copytree(run, place / "other")
                _write(place / "other" / file, content)

            if file == "config.yaml" and name == "empty":
                continue
            yield BadInput(f"{file} that is {name}", command, make)
    for where in ("nowhere", "/dev/null", DATA, "a" * 300):
        yield BadInput("report of", ("report", where))


def files() -> list[BadInput]:
    """Every input whose files are wrong."""
    found = []
    for name, make in CONFIGURATIONS.items():
        found.append(_placed(f"configuration: {name}", (f"--config={PLACE}/it",), make))
    for name, make in DATA_FOLDERS.items():
        found.append(_placed(f"data: {name}", (f"--data={PLACE}/it", "eval.tokens=8"), make))
    for name, make in MODELS.items():
        command = ("plan", f"--model={PLACE}/it/config.json", "--device=cpu")

        def inside(place: Path, run: Path, make: Make = make) -> None:
            (place / "it").mkdir()
            make(place / "it" / "config.json")

        found.append(BadInput(f"model: {name}", command, inside))
    return [*found, *_resumed(), *_reports()]


def _placed(kind: str, arguments: tuple[str, ...], make: Make) -> BadInput:
    return BadInput(kind, arguments, lambda place, run: make(place / "it"), tiny=True)
