r"""Turns Hugging Face models into megarlx checkpoints and back, and lays checkpoints out anew.

    python tools/convert_checkpoint.py --from hf --to megarlx SRC RUN
    python tools/convert_checkpoint.py --from hf --to megarlx SRC --into RUN \
        --iteration N --tokens T
    python tools/convert_checkpoint.py --from megarlx --to hf RUN[@ITER] DST
    python tools/convert_checkpoint.py --from megarlx --to megarlx RUN[@ITER] RUN2 \
        --layout tp,pp,dp

`mpirun -n N` before any of these shares the work; the bytes do not depend on N. A job that was
killed goes on where it was when the same command is given again. Exit status 1: an error, said on
stderr; 3: --verify found logits that differ by more than --tolerance.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from megarlx.checkpoint import CheckpointError
from megarlx.comm.share import share_of_this_process
from megarlx.hf.command import Asked, Converter
from megarlx.hf.export import TYPES


def arguments(argv: list[str] | None = None) -> Asked:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--from", choices=("hf", "megarlx"), required=True, dest="kind_from")
    add("--to", choices=("hf", "megarlx"), required=True, dest="kind_to")
    add("source", metavar="SRC", help="a folder of Hugging Face, or RUN[@ITER]")
    add("target", metavar="DST", nargs="?", type=Path, help="a run, or a folder to be made")
    add("--into", metavar="RUN", type=Path, help="a run to add the checkpoint to; may be new")
    add("--iteration", type=int, help="that the checkpoint gets (default: 0)")
    add("--tokens", help="seen in pre-training until then, as 4B or 4194304000 (default: 0)")
    add("--layout", metavar="tp,pp,dp", help="write the files that a run in this layout would")
    add("--weights", choices=("last", "average"), default="last", help="of the checkpoint, for hf")
    add("--dtype", choices=tuple(TYPES), help="of the tensors in hf (default: nothing is rounded)")
    add("--verify", action="store_true", help="compare logits with transformers on random tokens")
    add("--tolerance", type=float, default=1e-4, help="of --verify, relative (default: 1e-4)")
    add("--eos", help="the token that ends a text, where SRC's tokenizer does not say")
    add("--file-megabytes", type=float, default=1000, help="about how large files become")
    add("--files-at-once", type=int, help="on this rank (default: its share of 4, or the cores)")
    add("--fresh", action="store_true", help="replace what is there")
    add("--quiet", action="store_true", help="no progress")
    asked = parser.parse_args(argv)
    if asked.kind_from == asked.kind_to == "hf":
        parser.error("--from hf --to hf: there is nothing to convert")
    if (asked.target is None) is (asked.into is None):
        parser.error("give either DST or --into RUN")
    if asked.into is not None and (asked.kind_from, asked.kind_to) != ("hf", "megarlx"):
        parser.error("--into is for --from hf --to megarlx")
    if asked.into is not None and (asked.iteration is None or asked.tokens is None):
        parser.error("--into needs --iteration and --tokens")
    if asked.verify and asked.kind_from == asked.kind_to:
        parser.error("--verify compares with Hugging Face, and neither side is one")
    if asked.weights != "last" and (asked.kind_from, asked.kind_to) != ("megarlx", "hf"):
        parser.error("--weights is for --from megarlx --to hf")
    if asked.file_megabytes <= 0 or (asked.files_at_once or 1) < 1:
        parser.error("--file-megabytes must be above 0, --files-at-once at least 1")
    return Asked(
        kind_from=asked.kind_from,
        kind_to=asked.kind_to,
        source=asked.source,
        target=asked.target or asked.into,
        iteration=asked.iteration or 0,
        tokens=asked.tokens or "0",
        layout=asked.layout,
        weights=asked.weights,
        dtype=asked.dtype,
        verify=asked.verify,
        tolerance=asked.tolerance,
        eos=asked.eos,
        file_bytes=int(asked.file_megabytes * 1e6),
        files_at_once=asked.files_at_once,
        fresh=asked.fresh,
        quiet=asked.quiet,
    )


def main(argv: list[str] | None = None) -> int:
    asked = arguments(argv)
    share, ranks_here, end = share_of_this_process()
    try:
        status = Converter(asked, share, ranks_here).run()
    except (ValueError, OSError, CheckpointError) as error:
        print(f"convert_checkpoint: {error}", file=sys.stderr, flush=True)
        if share.ranks == 1:
            return 1
        # Without waiting for anybody: the launcher sees the status and ends the other ranks.
        os._exit(1)
    end()
    return status


if __name__ == "__main__":
    sys.exit(main())
