r"""`megarlx convert`: Hugging Face models into runs and back, and checkpoints laid out anew.

`mpirun -n N` before it shares the work; the bytes do not depend on N. A job that was killed goes
on where it was when the same command is given again.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from megarlx.config.families import TYPE_NAMES
from megarlx.printable import complain

KINDS = ("hf", "megarlx")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", metavar="SRC", help="a folder of Hugging Face, or RUN[@ITER]")
    add("target", metavar="DST", nargs="?", type=Path, help="a run, or a folder to be made")
    add("--from", choices=KINDS, dest="kind_from", help="what SRC is (default: as it looks)")
    add("--to", choices=KINDS, dest="kind_to", help="what DST becomes (default: the other kind)")
    add("--into", metavar="RUN", type=Path, help="a run to add the checkpoint to; may be new")
    add("--iteration", type=int, help="that the checkpoint gets (default: 0)")
    add("--tokens", help="seen in pre-training until then, as 4B or 4194304000 (default: 0)")
    add("--layout", metavar="tp,pp,dp", help="write the files that a run in this layout would")
    add("--weights", choices=("last", "average"), default="last", help="of the checkpoint, for hf")
    add("--dtype", choices=TYPE_NAMES, help="of the tensors in hf (default: nothing is rounded)")
    add("--verify", action="store_true", help="compare logits with transformers on random tokens")
    add("--tolerance", type=float, default=1e-4, help="of --verify, relative (default: 1e-4)")
    add("--eos", help="the token that ends a text, where SRC's tokenizer does not say")
    add("--file-megabytes", type=float, default=1000, help="about how large files become")
    add("--files-at-once", type=int, help="on this rank (default: its share of 4, or the cores)")
    add("--fresh", action="store_true", help="replace what is there")
    add("--quiet", action="store_true", help="no progress")


def run(arguments: argparse.Namespace) -> int:
    """1: an error, said on stderr; 2: asked for what cannot be; 3: --verify found logits that
    differ by more than --tolerance."""
    from megarlx.checkpoint import CheckpointError
    from megarlx.comm.share import share_of_this_process
    from megarlx.hf.command import Asked, Converter

    kind_from, kind_to = _kinds(arguments)
    if wrong := _wrong(arguments, kind_from, kind_to):
        complain(f"megarlx convert: {wrong}")
        return 2
    asked = Asked(
        kind_from=kind_from,
        kind_to=kind_to,
        source=arguments.source,
        target=arguments.target or arguments.into,
        iteration=arguments.iteration or 0,
        tokens=arguments.tokens or "0",
        layout=arguments.layout,
        weights=arguments.weights,
        dtype=arguments.dtype,
        verify=arguments.verify,
        tolerance=arguments.tolerance,
        eos=arguments.eos,
        file_bytes=int(arguments.file_megabytes * 1e6),
        files_at_once=arguments.files_at_once,
        fresh=arguments.fresh,
        quiet=arguments.quiet,
    )
    share, ranks_here, end = share_of_this_process()
    try:
        status = Converter(asked, share, ranks_here).run()
    except (ValueError, OSError, CheckpointError) as error:
        complain(f"megarlx convert: {error}")
        if share.ranks == 1:
            return 1
        # Without waiting for anybody: the launcher sees the status and ends the other ranks.
        os._exit(1)
    end()
    return status


def _kinds(arguments: argparse.Namespace) -> tuple[str, str]:
    from megarlx.hf.sources import is_hugging_face

    kind_from = arguments.kind_from or (
        "hf" if is_hugging_face(Path(arguments.source)) else "megarlx"
    )
    other = "megarlx" if kind_from == "hf" or arguments.layout else "hf"
    return kind_from, arguments.kind_to or other


def _wrong(arguments: argparse.Namespace, kind_from: str, kind_to: str) -> str:
    kinds = f"--from {kind_from} --to {kind_to}"
    if kind_from == kind_to == "hf":
        return f"{kinds}: there is nothing to convert"
    if (arguments.target is None) is (arguments.into is None):
        return "give either DST or --into RUN"
    if arguments.into is not None and (kind_from, kind_to) != ("hf", "megarlx"):
        return f"--into is for --from hf --to megarlx, and this is {kinds}"
    if arguments.into is not None and None in (arguments.iteration, arguments.tokens):
        return "--into needs --iteration and --tokens"
    if arguments.verify and kind_from == kind_to:
        return "--verify compares with Hugging Face, and neither side is one"
    if arguments.weights != "last" and (kind_from, kind_to) != ("megarlx", "hf"):
        return f"--weights is for --from megarlx --to hf, and this is {kinds}"
    if arguments.file_megabytes <= 0 or (arguments.files_at_once or 1) < 1:
        return "--file-megabytes must be above 0, --files-at-once at least 1"
    return ""
