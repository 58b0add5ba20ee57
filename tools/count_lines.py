"""Lines of code: neither blank, nor comment, nor docstring.

    python tools/count_lines.py [COMMIT] [--folders megarlx csrc …]

Counts the tracked files of the working tree, or of a commit; by folder, then by file with --files.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
C_LIKE = (".cpp", ".h", ".cu", ".cuh")
NOTHING = {
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.ENCODING, tokenize.ENDMARKER),
    *(tokenize.INDENT, tokenize.DEDENT),
}


def python_lines(text: str) -> int:
    counted: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NOTHING:
            counted |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        owner = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        if not isinstance(node, owner) or not node.body:
            continue
        if ast.get_docstring(node, clean=False) is not None:
            first = node.body[0]
            counted -= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return len(counted)


def c_lines(text: str) -> int:
    without = re.sub(r"/\*.*?\*/", lambda found: "\n" * found[0].count("\n"), text, flags=re.S)
    return sum(bool(re.sub(r"//.*", "", line).strip()) for line in without.splitlines())


def git(*words: str) -> str:
    done = subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True, check=True)
    return done.stdout


def files(commit: str | None, folders: list[str]) -> Iterator[tuple[str, str]]:
    if commit is None:
        for name in git("ls-files", "--", *folders).splitlines():
            if (ROOT / name).exists() and name.endswith((".py", *C_LIKE)):
                yield name, (ROOT / name).read_text()
        return
    for name in git("ls-tree", "-r", "--name-only", commit, "--", *folders).splitlines():
        if name.endswith((".py", *C_LIKE)):
            yield name, git("show", f"{commit}:{name}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("commit", nargs="?", help="absent: the working tree")
    parser.add_argument("--folders", nargs="+", default=["megarlx", "csrc"])
    parser.add_argument("--files", action="store_true", help="each file too")
    options = parser.parse_args()
    totals = dict.fromkeys(options.folders, 0)
    for name, text in files(options.commit, options.folders):
        count = python_lines(text) if name.endswith(".py") else c_lines(text)
        folder = next(one for one in options.folders if name.startswith(one))
        totals[folder] += count
        if options.files:
            print(f"{count:6,}  {name}")
    for folder, count in totals.items():
        print(f"{count:6,}  {folder}")


if __name__ == "__main__":
    main()
