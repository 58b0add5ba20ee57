"""`megarlx prepare`: token files (PREFIX.bin, PREFIX.idx) from JSONL, text or Parquet.

The result has the same bytes whatever N of `mpirun -n N` and --processes are. A job that was killed
goes on where it was when the same command is given again.
"""

from __future__ import annotations

import argparse
import json
import os
from typing import TYPE_CHECKING

from megarlx.data.documents import FORMATS, Reading
from megarlx.printable import complain

if TYPE_CHECKING:
    from megarlx.data.prepare import Settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="files (also .gz, .zst), or folders of them")
    add(
        "--tokenizer",
        required=True,
        help="'bytes', a tokenizer.json or its folder (a model's, a run's), NAME.words",
    )
    add("--out", required=True, metavar="PREFIX", help="writes PREFIX.bin, PREFIX.idx, PREFIX.json")
    add("--eos", help="the token that ends a document, where the tokenizer does not say")
    add("--format", choices=FORMATS, help="of all inputs, whatever their names")
    add("--key", default="text", help="field of JSON objects, column of Parquet (default: text)")
    add("--text-unit", choices=("line", "file"), default="line", help="what a document is in text")
    add("--on-bad-line", choices=("stop", "skip"), default="stop", help="no document in a line")
    add(
        "--processes",
        type=int,
        help="on this rank (default: the node's cores, shared by its ranks)",
    )
    add("--piece-megabytes", type=float, default=32, help="how finely plain files are cut")
    add("--fresh", action="store_true", help="throw away what is at PREFIX")
    add("--quiet", action="store_true", help="no progress")


def run(arguments: argparse.Namespace) -> int:
    from megarlx.comm.share import share_of_this_process
    from megarlx.data.prepare import prepare

    share, ranks_here, end = share_of_this_process()
    processes = arguments.processes or max(1, (os.cpu_count() or 1) // ranks_here)
    settings = _settings(arguments, processes)
    try:
        report = prepare(settings, share, not arguments.quiet)
    except (ValueError, OSError) as error:
        complain(f"megarlx prepare: {error}")
        if share.ranks == 1:
            return 1
        # Without waiting for anybody: the launcher sees the status and ends the other ranks.
        os._exit(1)
    end()
    if report is not None:
        shown = {k: v for k, v in report.items() if k not in ("plan", "inputs", "bad_examples")}
        print(json.dumps({"out": settings.out, **shown}))
        if report["bad_lines"]:
            lines = "\n".join(f"  {line}" for line in report["bad_examples"])
            complain(f"skipped {report['bad_lines']} bad lines, such as:\n{lines}")
    return 0


def _settings(arguments: argparse.Namespace, processes: int) -> Settings:
    from megarlx.data.prepare import Settings

    return Settings(
        inputs=tuple(arguments.inputs),
        tokenizer=arguments.tokenizer,
        out=arguments.out,
        eos=arguments.eos,
        format=arguments.format,
        reading=Reading(arguments.key, arguments.text_unit),
        on_bad_line=arguments.on_bad_line,
        piece_bytes=int(arguments.piece_megabytes * (1 << 20)),
        processes=processes,
        fresh=arguments.fresh,
    )
