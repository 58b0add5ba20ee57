"""The ops against torch eager, torch.compile and this machine's own copy and product speed.

python benchmarks/ops.py [--only sample token_loss averaging elementwise] [--json PATH] …
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from timing import Row, machine, markdown, number, write_json

OPS = ("sample", "token_loss", "averaging", "elementwise")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    facts = machine()
    for name, value in facts.items():
        print(f"{name}: {value}")
    rows: list[Row] = []
    for name in options.only:
        for found in importlib.import_module(f"op_rows.{name}").rows():
            rows.append(found)
            print(
                f"{found['name']:<32} {found['size']!s:<28} {number(found['ours']):>9} "
                f"{found['unit']}  {number(found['ratio']):>6} × {found['baseline_name']}",
                flush=True,
            )
        publish(options, facts, rows)


def publish(options: argparse.Namespace, facts: dict[str, object], rows: list[Row]) -> None:
    """After each op, so that a run that is cut off leaves what it measured."""
    if options.json:
        write_json(options.json, facts, rows)
    if options.markdown:
        notes = Path(__file__).parent / "op_rows" / "notes.md"
        text = notes.read_text() if notes.exists() else ""
        options.markdown.write_text(markdown("Ops on a CPU", facts, rows, text))


if __name__ == "__main__":
    main()
