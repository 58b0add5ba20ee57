"""Shows what is in a checkpoint or in a folder of Hugging Face, checks it, or compares two.

    python tools/inspect_checkpoint.py RUN[@ITER] [--verify]
    python tools/inspect_checkpoint.py --diff RUN@1000 RUN@2000

A path is RUN[@ITER], the folder of a checkpoint, or a folder of Hugging Face; --diff takes any two
of these and gives the norms of each tensor. Exit status 1: an error or damage, said on stderr.
"""

from __future__ import annotations

import argparse
import sys

from megarlx.checkpoint import CheckpointError
from megarlx.hf.inspect import check, describe, differences, only_in, open_source


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", metavar="PATH", nargs="?")
    parser.add_argument("--verify", action="store_true", help="read every byte, check digests")
    parser.add_argument("--diff", nargs=2, metavar=("A", "B"), help="norms of each tensor")
    asked = parser.parse_args(argv)
    if (asked.path is None) is (asked.diff is None):
        parser.error("give either PATH or --diff A B")
    try:
        if asked.diff is not None:
            show_differences(*asked.diff)
            return 0
        source = open_source(asked.path)
        for line in describe(source):
            print(line)
        if asked.verify:
            print(f"verified  {check(source)}")
    except (ValueError, OSError, CheckpointError) as error:
        print(f"inspect_checkpoint: {error}", file=sys.stderr)
        return 1
    return 0


def show_differences(a: str, b: str) -> None:
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


if __name__ == "__main__":
    sys.exit(main())
