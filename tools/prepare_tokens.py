"""Makes token files (PREFIX.bin, PREFIX.idx) from JSONL, text or Parquet.

    [mpirun -n N] python tools/prepare_tokens.py INPUT… --tokenizer T --out PREFIX

The result has the same bytes whatever N and --processes are. A run that was killed goes on where
it was when the same command is given again. Exit status 1: an error, said on stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import sys

from megarlx.comm.share import share_of_this_process
from megarlx.data.documents import FORMATS, Reading
from megarlx.data.prepare import Settings, prepare


def arguments(argv: list[str] | None = None) -> tuple[Settings, bool]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="files (also .gz, .zst), or folders of them")
    add("--tokenizer", required=True, help="'bytes', a tokenizer.json or its folder, NAME.words")
    add("--out", required=True, metavar="PREFIX", help="writes PREFIX.bin, PREFIX.idx, PREFIX.json")
    add("--eos", help="the token that ends a document, where the tokenizer does not say")
    add("--format", choices=FORMATS, help="of all inputs, whatever their names")
    add("--key", default="text", help="field of JSON objects, column of Parquet (default: text)")
    add("--text-unit", choices=("line", "file"), default="line", help="what a document is in text")
    add("--on-bad-line", choices=("stop", "skip"), default="stop")
    add(
        "--processes",
        type=int,
        help="on this rank (default: the node's cores, shared by its ranks)",
    )
    add("--piece-megabytes", type=float, default=32, help="how finely plain files are cut")
    add("--fresh", action="store_true", help="throw away what is at PREFIX")
    add("--quiet", action="store_true", help="no progress")
    asked = parser.parse_args(argv)
    settings = Settings(
        inputs=tuple(asked.inputs),
        tokenizer=asked.tokenizer,
        out=asked.out,
        eos=asked.eos,
        format=asked.format,
        reading=Reading(asked.key, asked.text_unit),
        on_bad_line=asked.on_bad_line,
        piece_bytes=int(asked.piece_megabytes * (1 << 20)),
        processes=asked.processes or 0,
        fresh=asked.fresh,
    )
    return settings, not asked.quiet


def main(argv: list[str] | None = None) -> int:
    from dataclasses import replace

    settings, show = arguments(argv)
    share, ranks_here, end = share_of_this_process()
    if settings.processes == 0:
        settings = replace(settings, processes=max(1, (os.cpu_count() or 1) // ranks_here))
    try:
        report = prepare(settings, share, show)
    except (ValueError, OSError) as error:
        print(f"prepare_tokens: {error}", file=sys.stderr, flush=True)
        # Without waiting for anybody: the launcher sees the status and ends the other ranks.
        os._exit(1)
    end()
    if report is not None:
        shown = {k: v for k, v in report.items() if k not in ("plan", "inputs", "bad_examples")}
        print(json.dumps({"out": settings.out, **shown}))
        if report["bad_lines"]:
            print(f"skipped {report['bad_lines']} bad lines, such as:", file=sys.stderr)
            print("\n".join(f"  {line}" for line in report["bad_examples"]), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
