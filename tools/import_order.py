"""The import order of megarlx, and the picture of it in docs/architecture.md."""

from __future__ import annotations

import ast
import textwrap
from html import escape
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "megarlx"

# Each line may import from itself and from the lines above it.
LAYERS = [
    ["plug", "processes", "printable", "redact", "naming", "units"],
    ["choices", "config"],
    ["comm"],
    ["ops"],
    ["parallel"],
    ["model"],
    ["data", "checkpoint", "hf"],
    ["generation"],
    ["rollouts"],
    ["objectives"],
    ["training"],
    ["evaluation"],
    ["run"],
    ["planning", "report", "doctor"],
    ["sweeps"],
    ["study"],
    ["cli", "__main__"],
]

GAP, WIDTH, HEAD, LINE = 14, 960, 34, 15  # pixels
STYLE = (
    "text{font-family:sans-serif;fill:#1b1b1b}.n{font-size:14px;font-weight:bold}"
    ".s{font-size:11px}rect{fill:#eef2f7;stroke:#5b6b7f}"
)


def imports_of_source(text: str, path: Path) -> list[str]:
    """Every module that a file imports, inside functions too; relative imports made absolute."""
    found = []
    parts = ["megarlx", *path.relative_to(PACKAGE).parts]
    for node in ast.walk(ast.parse(text, str(path))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(parts[: len(parts) - node.level]) if node.level else ""
            module = ".".join(x for x in (base, node.module or "") if x)
            found += [f"{module}.{alias.name}" for alias in node.names]
        elif (
            isinstance(node, ast.Call)
            and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module"
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            found.append(str(node.args[0].value))
    return found


def says(unit: str) -> str:
    """The first sentence of what a package or a module says of itself."""
    file = PACKAGE / unit / "__init__.py"
    file = file if file.exists() else PACKAGE / f"{unit}.py"
    text = " ".join((ast.get_docstring(ast.parse(file.read_text())) or "").split())
    return text.replace("`", "").partition(". ")[0].rstrip(".") + "."


def picture() -> str:
    """An SVG: a row for each line of LAYERS, what is used at the bottom, who uses it above."""
    rows, top = [], GAP
    for units in reversed(LAYERS):
        width = (WIDTH - GAP * (len(units) + 1)) / len(units)
        said = [textwrap.wrap(says(unit), int((width - 20) / 5.6)) for unit in units]
        height = HEAD + LINE * max(map(len, said))
        for place, (unit, lines) in enumerate(zip(units, said, strict=True)):
            left = GAP + place * (width + GAP)
            rows += _box(unit, lines, left, top, width, height)
        top += height + GAP
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top}">',
        "<title>Packages of megarlx: each imports from its own row and those below</title>",
        f"<style>{STYLE}</style>",
        f'<rect width="{WIDTH}" height="{top}" style="fill:white;stroke:none"/>',
    ]
    return "\n".join([*head, *rows, "</svg>"])


def _box(
    unit: str, lines: list[str], left: float, top: int, width: float, height: int
) -> list[str]:
    x = f'x="{left + 10:.0f}"'
    return [
        f'<rect x="{left:.0f}" y="{top}" width="{width:.0f}" height="{height}" rx="6"/>',
        f'<text class="n" {x} y="{top + 20}">{escape(unit)}</text>',
        *(
            f'<text class="s" {x} y="{top + 38 + i * LINE}">{escape(line)}</text>'
            for i, line in enumerate(lines)
        ),
    ]
