"""What tools/count_lines.py counts."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

PATH = Path(__file__).resolve().parents[2] / "tools" / "count_lines.py"


def tool() -> Any:
    spec = importlib.util.spec_from_file_location("count_lines", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_blank_lines_comments_and_docstrings_are_no_lines_of_code():
    python = (
        '"""One.\n\nTwo."""\n\nimport x  # why\n\n\n'
        'def f():\n    """What."""\n    # how\n    return """a\nb"""\n'
    )
    assert tool().python_lines(python) == 4  # import, def, and a text of two lines
    c = "/* a\n b */\nint x;  // y\n\n// z\nint f() {\n  return 1; /* c */\n}\n"
    assert tool().c_lines(c) == 4
