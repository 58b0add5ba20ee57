"""`megarlx inspect`: what a checkpoint or a folder of Hugging Face holds, how two differ, and which
questions stand in the training text."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from megarlx.config import ConfigError
from megarlx.config.arguments import add_trust
from megarlx.printable import complain, printable

if TYPE_CHECKING:
    from megarlx.run.overlap import Overlap


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path",
        metavar="PATH",
        nargs="?",
        help="RUN[@ITER], a checkpoint's folder, or a folder of Hugging Face",
    )
    parser.add_argument("--verify", action="store_true", help="read every byte, check digests")
    parser.add_argument("--diff", nargs=2, metavar=("A", "B"), help="norms of each tensor")
    parser.add_argument(
        "--overlap",
        action="store_true",
        help="which questions of RUN's prompts and suites stand in its token files, by source",
    )
    parser.add_argument(
        "--config", metavar="FILE.toml", help="of --overlap: suites in place of the run's own"
    )
    parser.add_argument(
        "--tokens-from",
        action="append",
        default=[],
        metavar="NAME=PREFIX",
        help="of --overlap: a token file besides those of the run's [data]",
    )
    parser.add_argument(
        "--run-tokens",
        type=int,
        default=13,
        metavar="N",
        help="of --overlap: so many tokens in a row count as found (default: 13)",
    )
    add_trust(parser)


def run(arguments: argparse.Namespace) -> int:
    from megarlx.checkpoint import CheckpointError

    try:
        if wrong := _wrong(arguments):
            complain(f"megarlx inspect: {wrong}")
            return 2
        if arguments.diff is not None:
            _show_differences(*arguments.diff)
        elif arguments.overlap:
            _show_overlap(arguments)
        else:
            _show(arguments.path, verify=arguments.verify)
    except ConfigError as error:
        complain(error)
        return 2
    except BrokenPipeError:  # who read the output has gone
        raise
    except (ValueError, OSError, CheckpointError) as error:
        complain(f"megarlx inspect: {error}")
        return 1
    return 0


def _wrong(arguments: argparse.Namespace) -> str:
    if (arguments.path is None) is (arguments.diff is None):
        return "give either PATH or --diff A B"
    if not arguments.overlap and (arguments.config or arguments.tokens_from):
        return "--config and --tokens-from are for --overlap"
    if arguments.overlap and (arguments.verify or arguments.diff):
        return "--overlap stands alone: without --verify and --diff"
    return ""


def _show(path: str, *, verify: bool) -> None:
    from megarlx.hf.inspect import check, describe, open_source

    source = open_source(path, newest=verify)
    for line in describe(source):
        print(printable(line))
    if verify:
        print(f"verified  {check(source)}")


def _show_differences(a: str, b: str) -> None:
    from megarlx.hf.inspect import differences, only_in, open_source

    one, other = open_source(a), open_source(b)
    longest = max(len(name) for name in (*one.shapes, "tensor"))
    columns = f"{'norm of A':>12}  {'norm of B':>12}  {'of A - B':>12}  {'relative':>9}"
    print(f"{'tensor':<{longest}}  {columns}")
    for found in differences(one, other):
        print(
            f"{found.name:<{longest}}  {found.one:12.6g}  {found.other:12.6g}  "
            f"{found.between:12.6g}  {found.relative:9.3g}"
        )
    for label, names in (("A", only_in(one, other)), ("B", only_in(other, one))):
        if names:
            shown = ", ".join(names[:6]) + (", …" if len(names) > 6 else "")
            print(f"only in {label}: {len(names)} tensors: {shown}")


def _show_overlap(arguments: argparse.Namespace) -> None:
    from megarlx.run.overlap import not_looked_at, overlaps

    found = overlaps(
        arguments.path,
        suites=arguments.config,
        token_files=arguments.tokens_from,
        run_tokens=arguments.run_tokens,
        trusted=arguments.trusted,
    )
    for one in found:
        for line in _lines(one):
            print(printable(line))
    left_out = not_looked_at(arguments.path, suites=arguments.config, trusted=arguments.trusted)
    if left_out:
        print(printable(f"not looked at, as they ask no questions: {', '.join(left_out)}"))


def _lines(one: Overlap) -> list[str]:
    lines = [f"{one.name}: {one.questions:,} questions, {one.run_tokens} tokens in a row"]
    if one.short:
        lines.append(f"  {one.short:,} are shorter than that: nothing is known of them")
    width = max(map(len, one.by_source), default=0)
    for name, count in one.by_source.items():
        share = count / max(1, one.long)
        lines.append(f"  in {name:<{width}}  {count:,} of {one.long:,} ({share:.1%})")
    for measured in one.measured:
        lines.append(f"  pass@1 at iteration {measured.iteration}: {measured}")
    return lines
