"""The `megarlx` command. Each subcommand is a module with `add_arguments(parser)` and `run(args)`.

A module is imported only when its command is called, so that `megarlx --help` is quick and a
command that needs little (doctor) runs where much is missing.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megarlx import __version__

_with_place = warnings.formatwarning  # of Python


class Command(NamedTuple):
    """Where a subcommand lives and what it says about itself."""

    module: str
    summary: str


COMMANDS: Mapping[str, Command] = {
    "config": Command("megarlx.config.command", "check a configuration and print it in full"),
    "train": Command(
        "megarlx.run.command", "train a run, or go on with it where its folder holds checkpoints"
    ),
    "evaluate": Command(
        "megarlx.run.evaluate_command", "measure a checkpoint: pass@k, capability, behaviour"
    ),
    "generate": Command(
        "megarlx.run.generate_command", "what a checkpoint says to a prompt, as it is drawn"
    ),
    "chat": Command("megarlx.run.chat_command", "a conversation with a checkpoint"),
    "branch": Command(
        "megarlx.run.branch_command", "an excursion: start from a checkpoint, follow a recipe"
    ),
    "transplant": Command(
        "megarlx.run.transplant_command", "add what excursions changed to another checkpoint"
    ),
    "merge": Command("megarlx.run.merge_command", "the mean of several checkpoints' weights"),
    "demo": Command("megarlx.study.demo", "a trunk, excursions and their report, in minutes"),
    "convert": Command(
        "megarlx.hf.convert_command", "a Hugging Face model into a run, a run into one"
    ),
    "prepare": Command("megarlx.data.prepare_command", "texts into token files"),
    "inspect": Command(
        "megarlx.run.inspect_command", "what a checkpoint holds; what of a test stands in the data"
    ),
    "study": Command("megarlx.study.command", "what decides how the study is run: gate, tuning"),
    "sweep": Command("megarlx.sweeps.command", "all runs of a study, resumed where they stopped"),
    "report": Command("megarlx.report.command", "figures, a page and summary.json of many runs"),
    "view": Command("megarlx.report.view_command", "the samples of runs, as a page to read"),
    "tree": Command("megarlx.report.tree", "which run came from which, and what it reached"),
    "plan": Command(
        "megarlx.planning.command", "memory, messages and time of a layout, without the GPUs"
    ),
    "doctor": Command(
        "megarlx.doctor.command", "what is installed, built and visible, and how to mend the rest"
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    position = next((i for i, word in enumerate(argv) if not word.startswith("-")), len(argv))
    parser = _parser()
    parser.parse_args(argv[:position])
    if position == len(argv):
        parser.print_help()
        return 2
    name = argv[position]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        print(
            f"megarlx: unknown command '{name}'; {hint}Commands: {', '.join(COMMANDS)}",
            file=sys.stderr,
        )
        return 2
    return _run(name, argv[position + 1 :])


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    parser = argparse.ArgumentParser(
        prog="megarlx",
        usage="megarlx [--help] [--version] COMMAND ...",
        description="Trains language models, with reinforcement learning anywhere in the training.",
        epilog="commands:\n"
        + "\n".join(f"  {name:<{width}}  {c.summary}" for name, c in COMMANDS.items())
        + "\n\n`megarlx COMMAND --help` tells more about one.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"megarlx {__version__}")
    return parser


def _warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: Any = None
) -> str:
    """Ours in a line, as everything that is said; of other packages with the place in the code."""
    if issubclass(category, UserWarning) and Path(filename).is_relative_to(Path(__file__).parent):
        return f"warning: {message}\n"
    return _with_place(message, category, filename, lineno, line)


def _run(name: str, arguments: Sequence[str]) -> int:
    warnings.formatwarning = _warning
    command = COMMANDS[name]
    module = importlib.import_module(command.module)
    parser = argparse.ArgumentParser(
        prog=f"megarlx {name}", description=command.summary, allow_abbrev=False
    )
    module.add_arguments(parser)
    parsed = parser.parse_args(arguments)
    try:
        status: int = module.run(parsed)
        sys.stdout.flush()
    except KeyboardInterrupt as stop:
        print(f"megarlx {name}: stopped by {str(stop) or 'Ctrl-C'}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (head, less) has gone. Python would try to flush once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return status
