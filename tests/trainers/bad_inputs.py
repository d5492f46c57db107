"""Inputs that are wrong, from a seeded grammar: settings, options of methods, and flags.

Each input is one command line with one thing wrong in it, at a random place among settings that
are right. `bad_files` has those whose files or folders are wrong.
"""

from __future__ import annotations

import random
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lowrank.trainers.config import RunConfig

#: In arguments: the folder in which the input's files are made, the data, and a finished run.
PLACE, DATA, RUN = "{place}", "{data}", "{run}"


@dataclass(frozen=True)
class BadInput:
    """One wrong input.

    Attributes:
        kind: what is wrong, for counting.
        arguments: of the command, with `PLACE`, `DATA` and `RUN` in place of folders.
        make: makes files in the place, of which it is given the folder and the finished run's.
        tiny: whether it is a `pretrain` to which the settings of a tiny run are added.
    """

    kind: str
    arguments: tuple[str, ...]
    make: Callable[[Path, Path], None] | None = None
    tiny: bool = False

    def __str__(self) -> str:
        return f"{self.kind}: {' '.join(self.arguments)}"[:200]


#: Values of the wrong type, as YAML.
WRONG_TYPES = {
    int: ("x", "1.5", "true", "[1]", "{a: 1}", ".nan", "1e400", "-.inf", "'7'", "2024-01-01"),
    float: ("x", "true", "[1]", "{}", ".nan", ".inf", "-.inf", "'0.5'", "1e999", "é"),
    bool: ("1", "0.0", "maybe", "[true]", "'true'", ".nan"),
    str: ("5", "true", "[a]", "{a: b}", "1.5", ".nan", "null"),
}

#: Values out of range, by key.
OUT_OF_RANGE: dict[str, tuple[str, ...]] = {
    "train.steps": ("0", "-1", f"-{10**30}"),
    "train.batch_size": ("0", "-2"),
    "train.accumulation": ("0", "-3"),
    "train.max_skips": ("0",),
    "train.seed": ("-1", str(2**32), str(10**40)),
    "train.threads": ("-1", "100000"),
    "train.clip": ("-1", "-1e-9"),
    "train.clip_norm": ("projected", "previous", "exactly"),
    "train.spike": ("-0.5",),
    "train.device": ("tpu", "cuda:99", "cuda:-1", "cpu:x", "''", "meta", "cüda"),
    "schedule.name": ("cosin", "''", "COSINE"),
    "schedule.warmup_ratio": ("-0.1", "1.1", "1e300"),
    "schedule.min_ratio": ("2", "-1"),
    "eval.every": ("-1",),
    "eval.tokens": ("0", "-5"),
    "eval.batch_size": ("-1",),
    "checkpoint.every": ("-1",),
    "checkpoint.keep": ("0", "-2"),
    "log.memory_steps": ("-1", "1001"),
    "distributed.strategy": ("fsdp", "''", "DDP"),
    "distributed.data_shards": ("-1",),
    "distributed.zero_stage": ("2", "0", "4"),
    "distributed.timeout": ("0", "-1", "1e12"),
    "model.name": ("llama_8m", "''", "../llama_9m", "llama_9m.yaml", "ллама"),
    "model.hidden_size": ("0", "-32", "33", str(10**12), str(2**63), str(10**40)),
    "model.intermediate_size": ("0", str(10**14)),
    "model.num_hidden_layers": ("0", "-1", str(10**9)),
    "model.num_attention_heads": ("0", "3", "64"),
    "model.vocab_size": ("0", "100", str(10**13), str(2**64)),
    "model.rope_theta": ("0", "-1"),
    "model.rms_norm_eps": ("0", "-1e-6"),
    "model.initializer_range": ("-1", "0"),
    "model.dtype": ("float16", "fp32", "''"),
    "model.weight_bits": ("5", "0", "32", "-8"),
    "model.compressed_activations": ("-1",),
    "model.compression_gap": ("0", "-1"),
    "model.initial": ("/nowhere/at/all", "/dev/null", "/"),
    "data.sequence_length": ("0", "1", "-5"),
    "data.packing": ("packed", "''"),
    "data.shuffle_block": ("-1",),
    "data.workers": ("-1", str(10**6)),
    "data.tokenizer": ("''", "nosuch/tokenizer", "bite", "/dev/null", "../.."),
    "data.text_key": ("''", "'  '", "body"),
    "data.bad_documents": ("ignore", "''"),
    "optimizer.name": ("galore_adam", "''", "ADAMW", "official:nothing", "official:", "адам"),
    "optimizer.lr": ("0", "-1e-3", ".nan", ".inf", "high", "[1]", "null"),
}

#: Settings that don't go together.
CONTRADICTIONS = (
    ("schedule.name=wsd", "schedule.warmup_ratio=0.6", "schedule.decay_ratio=0.6"),
    ("schedule.name=cosine_restarts", "schedule.cycle=5", "schedule.restart_warmup=5"),
    ("distributed.strategy=fsdp2", "distributed.low_rank_gradients=true"),
    ("distributed.strategy=ddp", "distributed.zero_stage=3"),
    ("train.clip_norm=previous", "train.clip=1.0"),
    ("optimizer.scale=1.0", "optimizer.alpha=2.0"),
    ("optimizer.name=fira_adamw", "optimizer.scale=1.0", "optimizer.alpha=2.0"),
    ("optimizer.name=qgalore_adamw_8bit", "model.weight_bits=8", "optimizer.weight_bits=null"),
    ("optimizer.name=adamw", "optimizer.weight_bits=4", "model.weight_bits=8"),
    ("optimizer.name=muon", "optimizer.min_8bit_size=0"),
    ("optimizer.name=galore_adamw", "optimizer.foreach=true", "optimizer.fused=true"),
    ("optimizer.name=sst_adamw", "model.weight_bits=4"),
    ("optimizer.name=relora_adamw", "model.compressed_activations=4"),
    ("optimizer.name=galore_plus_adamw", "optimizer.proj_type=right"),
    ("optimizer.name=fira_adamw", "optimizer.proj_type=full"),
    ("optimizer.name=galore_adamw_8bit", "optimizer.moments_dtype=bfloat16"),
    ("optimizer.name=coap_adamw", "optimizer.update_proj_gap=3", "optimizer.update_interval=4"),
    ("model.num_attention_heads=4", "model.hidden_size=36"),
    ("model.vocab_size=200", "data.tokenizer=bytes"),
)

METHODS = (
    *("galore_adamw", "galore_adamw_8bit", "galore_adafactor", "fira_adamw", "coap_adamw"),
    *("apollo_adamw", "online_subspace_lion", "qgalore_adamw_8bit", "frugal_adamw"),
    *("relora_adamw", "sltrain_adamw", "sst_adamw", "switchlora_adamw", "loqt_adamw"),
    *("foam_adamw", "ldadam_adamw", "racs_adamw", "scale_sgd", "alice_adamw", "galore_muon"),
)
#: Values that no method accepts of these options.
OPTIONS: dict[str, tuple[str, ...]] = {
    "rnk": ("4",),
    "rank": ("0", "-1", "1.5", "x", "true", ".nan", "[4]"),
    "update_proj_gap": ("0", "-1", "x", "1.5", ".inf"),
    "betas": ("0.9", "[0.9]", "[1.0, 0.9]", "x", "[0.9, 0.99, 0.999, 1]", "[.nan, 0.9]", "[a, b]"),
    "eps": ("-1", "x", ".nan", "[1e-8]"),
    "weight_decay": ("-1", "x", ".inf", "[0.1]"),
    "moments_dtype": ("float8", "5"),
    "patterns": ("5", "nothing_at_all", "'('", "[]", "[1]", "''", "true"),
    "plain_lr": ("-1", "x", ".nan"),
    "seed": ("-1", "x", "1.5"),
    "maximize": ("7", "maybe"),
    "skip_nonfinite": ("7", "maybe"),
    "stochastic_rounding": ("7", "often"),
    "proj_type": ("sideways", "5"),
    "projector": ("nothing", "5"),
    "refresh": ("slowly",),
    "schedule": ("never", "5"),
    "scale": (".nan", "x", "[1]"),
    "lr_scale_of_nothing": ("1",),
}

#: Settings that are right, among which a wrong one stands.
RIGHT = (
    *(
        "train.seed=3",
        "eval.every=0",
        "checkpoint.keep=3",
        "train.clip=1.0",
        "schedule.name=linear",
    ),
    *(
        "schedule.warmup_ratio=0.2",
        "data.packing=pad",
        "checkpoint.best=false",
        "eval.batch_size=1",
    ),
)

FLAGS = (
    *(("--steps", value) for value in ("x", "1.5", "", "nan", "1e3", "--seed", "\uff19\uff19x")),
    *(("--seed", value) for value in ("x", "-1", "1e400", str(10**30))),
    *(("--model", value) for value in ("", "llama_8m", "\udcff", "a" * 300, "lla\nma")),
    *(("--optimizer", value) for value in ("", "galoreadamw", "adamw,fira_adamw", "\u202e")),
    *(
        ("--data", value)
        for value in ("", "nowhere", "/dev/null", "a" * 5000, "no\nwhere", "\udcff")
    ),
    *(("--device", value) for value in ("", "gpu", "cuda:", "cuda:999999999999999999999")),
    *(
        ("--set", value)
        for value in ("", "=", "a", "a=b", "a.b.c=1", ".=1", "train.=1", ".steps=1")
    ),
    *(
        ("--set", value)
        for value in ("train.steps", "train.steps==3", "train.steps={", "train.x=[")
    ),
    *(
        ("--set", value)
        for value in ("optimizer.betas={a: 1}", "no.such=1", "train.steps=!!python/x 1")
    ),
    *(("--set", value) for value in ("train.steps=*a", "train.steps=\x00", "train.steps=\ud800")),
    *(("--resume", value) for value in ("", "nowhere", "/dev/null", "autos", "a" * 300, "/")),
    *(("--config", value) for value in ("", "nowhere.yaml", "/", "/dev/null/x", "a" * 5000)),
    *(("--output", value) for value in ("/dev/null", "/dev/null/run", "/proc/run", "a" * 300)),
    *((value,) for value in ("--no-such-flag", "stray", "--steps", "--set", "--", "-x")),
)

_PLAN = {
    "--model": ("llama_8m", "", "nowhere/config.json", "/dev/null", "/", "a" * 300),
    "--optimizer": ("adam_w", "", "official:galore_adamw"),
    "--memory": ("x", "-1GB", "nanGB", "1e400GB", "0", "16XB", "", "GB", "infGB", "16 GB GB"),
    "--card": ("none", "", "RTX99999", "H100H100"),
    "--sequence": ("0", "-1", "x", "1.5", str(10**30)),
    "--batch": ("0", "-1", "x", str(10**30)),
    "--accumulation": ("0", "-1", "x"),
    "--world": ("0", "-1", "x", str(10**30)),
    "--strategy": ("fsdp", "", "deepspeed", "ddp"),
    "--device": ("tpu", "", "cuda:99"),
    "--dtype": ("float8", "", "fp16"),
    "--weight-bits": ("5", "x", "-4"),
    "--option": ("rank", "=", "a.b=1", "rnk=4", "rank=0", "rank=x", "betas=0.9", "lr=-1", "rank={"),
    "--plot": ("plot.png", "nowhere/plot.png", "plot.xyz"),
    "--nothing": ("1",),
}
_COMPARE = {
    "--methods": (
        *("", "adam", "adamw,adamw", "adamw+", "adamw+rank", "+rank=4", "adamw,,fira_adamw"),
        *("adamw+train.steps=3", "official:nothing", "adamw+rank={", "adamw+no.such=1"),
        "galore_adamw+rank=0",
    ),
    "--seeds": ("", "x", "-1", "0,0", "0,,1", "1.5", str(2**32), "0;1", "²"),
    "--steps": ("0", "3", "-1", "x"),
    "--equal": ("speed", ""),
    "--jobs": ("0", "-1", "x"),
    "--model": ("llama_8m", "", "."),
    "--data": ("nowhere", "/dev/null"),
    "--rates": ("nowhere", "/dev/null", "/"),
    "--tuning-seed": ("x", "-1", str(2**40)),
    "--set": (
        "train.steps=5",
        "train.seed=1",
        "a=b",
        "no.such=1",
        "train.clip=-1",
        "model.dtype=x",
    ),
    "--output": ("/dev/null", "/", "/dev/null/x"),
}


def _settings() -> Iterator[BadInput]:
    config = RunConfig()
    for section in fields(RunConfig):
        content = getattr(config, section.name)
        hints = typing.get_type_hints(type(content))
        for part in fields(content):
            accepted = _kinds(hints[part.name])
            for kind in accepted & WRONG_TYPES.keys():
                for value in WRONG_TYPES[kind]:
                    if type(None) in accepted and value in ("null", ""):
                        continue
                    yield _set("wrong type", f"{section.name}.{part.name}={value}")
    for key, values in OUT_OF_RANGE.items():
        yield from (_set("out of range", f"{key}={value}") for value in values)
    for settings in CONTRADICTIONS:
        yield _set("contradiction", *settings)
    for section in ("train", "model", "data", "schedule", "log", "eval", "checkpoint"):
        yield _set("unknown key", f"{section}.nothing=1")
        yield _set("unknown key", f"{section}s.steps=1")


def _kinds(hint: Any) -> set[type]:
    return set(typing.get_args(hint)) if isinstance(hint, types.UnionType) else {hint}


def _set(kind: str, *settings: str) -> BadInput:
    return BadInput(kind, settings, tiny=True)


def _options() -> Iterator[BadInput]:
    for name in METHODS:
        for key, values in OPTIONS.items():
            for value in values:
                yield _set(
                    "option of a method", f"optimizer.name={name}", f"optimizer.{key}={value}"
                )


def _flags() -> Iterator[BadInput]:
    for flag in FLAGS:
        joined = (f"{flag[0]}={flag[1]}",) if len(flag) == 2 else flag
        yield BadInput("flag", joined, tiny=True)
    for values, base in (
        (_PLAN, ("plan", "--model=llama_9m", "--device=cpu")),
        (_COMPARE, ("compare", f"--data={DATA}", f"--output={PLACE}/out", "--methods=adamw")),
    ):
        for flag, texts in values.items():
            for text in texts:
                yield BadInput(f"{base[0]} flag", (*base, f"{flag}={text}"))
    yield BadInput("plan flag", ("plan", "--all", "--optimizer=adamw"))
    yield BadInput("plan flag", ("plan", "--memory=1GB", "--card=4090"))
    yield BadInput("compare flag", ("compare", f"--output={PLACE}/out"))
    for arguments in ((), ("train",), ("methods", "x"), ("methods", "--json"), ("report",)):
        yield BadInput("subcommand", arguments)
    yield BadInput("subcommand", ("report", "a", "b"))


def settings_and_flags(seed: int, count: int) -> list[BadInput]:
    """So many inputs, each kind about as often as any other."""
    source = random.Random(seed)
    kinds: dict[str, list[BadInput]] = {}
    for item in (*_settings(), *_options(), *_flags()):
        kinds.setdefault(item.kind, []).append(item)
    for items in kinds.values():
        source.shuffle(items)
    found: list[BadInput] = []
    while len(found) < count and any(kinds.values()):
        for items in kinds.values():
            if items:
                found.append(_among_right(items.pop(), source))
    return found[:count]


def _among_right(item: BadInput, source: random.Random) -> BadInput:
    """A wrong setting among right ones."""
    if not item.tiny or any("=" not in text or text.startswith("-") for text in item.arguments):
        return item
    given = {text.partition("=")[0] for text in item.arguments}
    more = [text for text in source.sample(RIGHT, 2) if text.partition("=")[0] not in given]
    mixed = [*item.arguments, *more]
    source.shuffle(mixed)
    return BadInput(item.kind, tuple(mixed), item.make, tiny=True)
