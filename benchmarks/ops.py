"""The ops against torch eager, torch.compile and this machine's own copy and product speed.

python benchmarks/ops.py [--only OP …] [--json PATH] …
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from timing import Row, add_outputs, machine, shown, write_results

OPS = (
    *("sample", "token_loss", "averaging", "elementwise", "normal", "narrow_product"),
    *("product", "attention"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=OPS, default=list(OPS))
    add_outputs(parser)
    options = parser.parse_args()
    facts = machine()
    for name, value in facts.items():
        print(f"{name}: {value}")
    notes = (Path(__file__).parent / "op_rows" / "notes.md").read_text(encoding="utf-8")
    rows: list[Row] = []
    for name in options.only:
        for found in importlib.import_module(f"op_rows.{name}").rows():
            rows.append(shown(found))
        # after each op, so that a run that is cut off leaves what it measured
        write_results(options, "Ops on a CPU", facts, rows, notes)


if __name__ == "__main__":
    main()
