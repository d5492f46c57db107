"""The `lowrank` command. Heavy modules are imported by the subcommand that needs them."""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from . import compress_command, plan_command
from .termination import Terminated

EXIT_FAILED = 1
EXIT_WRONG = 2
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143
#: Characters of a message that anyone reads.
_LONGEST = 1000
_SHORT_OF_MEMORY = (
    "there is not enough memory; `lowrank plan` says what fits: try a smaller train.batch_size with"
    " more train.accumulation, or model.activation_checkpointing"
)

_PRETRAIN_TEXT = """\
Pretrains a LLaMA and leaves a folder with the resolved configuration, metrics, checkpoints, a
summary and a report to open in a browser. With no options at all: the small llama_9m on the text of
this Python installation, a few minutes on two CPU cores, nothing downloaded.
"""
_PRETRAIN_EXAMPLES = """\
settings that matter, for --set (the folder's config.yaml lists all of them):
  optimizer.lr, optimizer.rank, and any other option of the optimizer
  train.batch_size, train.accumulation, train.clip
  data.sequence_length, data.packing=pack|pad, data.tokenizer=bpe|bytes|NAME, data.text_key=FIELD
  schedule.name=cosine|linear|wsd|constant, schedule.warmup_ratio
  eval.every, eval.tokens, checkpoint.every, checkpoint.keep
  model.dtype=float32|bfloat16, model.activation_checkpointing, model.autocast, model.compile
  model.weight_bits=16|8|4, model.compressed_activations=COLUMNS
  distributed.strategy=auto|ddp|fsdp2|deepspeed (under torchrun), distributed.timeout
  log.wandb=true, log.memory_steps=N (peaks by phase of the first N steps, beside the plan's)

examples:
  lowrank pretrain
  lowrank pretrain --data ../texts --steps 500 --set optimizer.rank=64
  lowrank pretrain --model llama_60m --data c4 --set data.tokenizer=t5-base data.packing=pad
  lowrank pretrain --output runs/mine --resume auto
  torchrun --nproc-per-node 2 -m lowrank.trainers.cli pretrain --output runs/two
"""


class _Parser(argparse.ArgumentParser):
    """One that says what is wrong in one line, and takes flags by their whole names alone."""

    def __init__(self, **options: Any) -> None:
        # An abbreviation would mean something else once a flag with the same beginning is added.
        super().__init__(**{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        """Ends the process with the message, and where the usage is to be had."""
        sys.exit(_fail(f"{message}; `{self.prog} --help` shows the usage", EXIT_WRONG))


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    main_parser = _Parser(prog="lowrank", description="Pretrain language models in little memory.")
    commands = main_parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    pretrain = commands.add_parser(
        "pretrain",
        help="pretrain a LLaMA",
        description=_PRETRAIN_TEXT,
        epilog=_PRETRAIN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    pretrain.set_defaults(run=_pretrain)
    add = pretrain.add_argument
    add(
        "--model",
        metavar="NAME",
        help="llama_9m (default), llama_1m, llama_60m, 130m, 350m, 1b or 7b",
    )
    add("--optimizer", metavar="NAME", help="default galore_adamw; `lowrank methods` lists all")
    add("--data", metavar="SOURCE", help="stdlib (default), c4, or a folder of text files")
    add("--steps", metavar="N", type=int, help="optimizer steps")
    add("--seed", metavar="N", type=int, help="seed of weights and data order (default 42)")
    add("--device", metavar="NAME", help="auto (default: CUDA if there is any), cpu, cuda, cuda:1")
    add("--output", metavar="FOLDER", type=Path, help="the run's folder (default runs/NAME-001)")
    add(
        "--resume",
        metavar="auto|FOLDER",
        help="go on from the newest whole checkpoint of --output (auto starts afresh where there is"
        " none), or from a run's folder or one checkpoint",
    )
    add("--config", metavar="FILE", type=Path, help="a YAML file of settings, below the flags")
    add(
        "--set",
        metavar="KEY=VALUE",
        action="extend",
        nargs="+",
        default=[],
        dest="overrides",
        help="one or more single settings as section.key=value, above everything else",
    )

    plan_command.add_parser(commands)
    compress_command.add_parser(commands)

    from .compare.arguments import add_compare

    add_compare(commands).set_defaults(run=_compare)

    report = commands.add_parser("report", help="write a run's or a comparison's report.html again")
    report.set_defaults(run=_report)
    report.add_argument("folder", type=Path, metavar="FOLDER", help="a run's or a comparison's")

    methods = commands.add_parser("methods", help="list the optimizers")
    methods.set_defaults(run=_methods)
    methods.add_argument("--markdown", action="store_true", help="the table of docs/methods.md")
    methods.add_argument("--system", action="store_true", help="also print versions and the device")
    return main_parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one subcommand.

    Args:
        arguments: the command line without the program's name; by default this process's own.

    Returns:
        The exit status: 0, 1 (the run could not go on), 2 (something asked for is wrong), 130
        (interrupted) or 143 (ended by SIGTERM, saved).
    """
    options = parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], None] = options.run
    with warnings.catch_warnings():
        warnings.showwarning = _shown_once()
        try:
            run(options)
        except Terminated as end:
            how = f"go on with: lowrank pretrain --resume {end.checkpoint.parent.parent}"
            return _fail(f"{end}; {how}", EXIT_TERMINATED, end)
        except KeyboardInterrupt as end:
            text = str(end) or "interrupted; what was saved can be resumed with --resume"
            return _fail(text, getattr(end, "status", EXIT_INTERRUPTED), end)
        except (ValueError, ImportError) as error:
            return _fail(str(error), EXIT_WRONG, error)
        except OSError as error:
            return _fail(_system_text(error), EXIT_FAILED, error)
        except (RuntimeError, MemoryError) as error:
            return _fail_at_work(error)
    return 0


def _pretrain(options: argparse.Namespace) -> None:
    from rich.console import Console

    from .pretrain import Request, pretrain

    pretrain(Request(_settings(options), options.output, options.resume), Console(stderr=False))


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """The explicit settings: the configuration file, the flags over it, --set over both."""
    from .config_io import merge, parse_override, read_layer

    layer: dict[str, Any] = read_layer(options.config) if options.config else {}
    flags = {
        ("model", "name"): options.model,
        ("optimizer", "name"): options.optimizer,
        ("data", "source"): options.data,
        ("train", "steps"): options.steps,
        ("train", "seed"): options.seed,
        ("train", "device"): options.device,
    }
    for (section, key), value in flags.items():
        if value is not None:
            layer = merge(layer, {section: {key: value}})
    return merge(layer, *(parse_override(text) for text in options.overrides))


def _compare(options: argparse.Namespace) -> None:
    from rich.console import Console

    from .compare.arguments import asked_for
    from .compare.command import compare

    compare(asked_for(options), Console(stderr=False))


def _report(options: argparse.Namespace) -> None:
    from rich.console import Console

    from .report import write_report

    if (options.folder / "comparison.json").is_file():
        from .compare.command import report

        console = Console()
        written = str(report(options.folder, console))
        console.print(written, highlight=False, markup=False, soft_wrap=True)
        return
    Console().print(
        str(write_report(options.folder)), highlight=False, markup=False, soft_wrap=True
    )


def _methods(options: argparse.Namespace) -> None:
    from .methods import methods_page, print_methods, print_system

    if options.markdown:
        sys.stdout.write(methods_page())
        return
    print_methods()
    if options.system:
        print_system()


def _fail_at_work(error: RuntimeError | MemoryError) -> int:
    """A failure while the run was going: orderly ones in one line, unforeseen ones as they are."""
    from .loop import TrainingError
    from .memory import is_out_of_memory
    from .watch import LostProcessError

    if is_out_of_memory(error):
        return _fail(f"{_SHORT_OF_MEMORY} ({_asked(error)})", EXIT_FAILED, error)

    if isinstance(error, TrainingError | LostProcessError):
        return _fail(str(error), EXIT_FAILED, error)
    raise error


def _asked(error: BaseException) -> str:
    """How much memory was asked for, in a library's words."""
    found = re.search(r"tried to allocate ([\d.,]+ \w+)", str(error), re.IGNORECASE)
    return f"tried to allocate {found[1]}" if found else type(error).__name__


def _system_text(error: OSError) -> str:
    """The file and the reason, without the number that only a programmer knows."""
    if error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error.strerror or error)


def _fail(message: str, status: int, error: BaseException | None = None) -> int:
    """One line, unless another process of the run shows this error."""
    text = " ".join(message.split())
    if len(text) > _LONGEST:
        # Values that were given are repeated in it.
        text = f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
    if not getattr(error, "said_by_another", False):
        sys.stderr.write(f"lowrank: {text}\n")
    return status


def _shown_once() -> Callable[..., None]:
    """Shows a warning as one line, without the place in the code, which says nothing to a user.

    A run builds an optimizer several times, for plans and formulas: what is said again is left out.
    """
    said: set[str] = set()

    def show(message: Warning | str, *place: Any, **keywords: Any) -> None:
        if str(message) not in said:
            said.add(str(message))
            sys.stderr.write(f"warning: {message}\n")

    return show


if __name__ == "__main__":
    sys.exit(main())
