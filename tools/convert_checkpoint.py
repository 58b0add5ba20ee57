"""`megarlx convert`, by the name of a file: the same words."""

from __future__ import annotations

import sys

from megarlx import cli


def main(argv: list[str] | None = None) -> int:
    return cli.main(["convert", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
