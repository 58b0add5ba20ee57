import random
import tomllib
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from megarlx.config.lines import Path, line_numbers


def paths_of(value: Any, path: Path = ()) -> set[Path]:
    """Every table, key and array element that tomllib read."""
    if isinstance(value, dict):
        below = [((*path, key), inner) for key, inner in value.items()]
    elif isinstance(value, list):
        below = [((*path, i), inner) for i, inner in enumerate(value)]
    else:
        return set()
    return {p for p, _ in below} | {q for p, inner in below for q in paths_of(inner, p)}


class Writer:
    """Writes TOML in varied styles and keeps the line of each key as it goes."""

    def __init__(self, choose: random.Random) -> None:
        self.choose = choose
        self.text = ""
        self.lines: dict[Path, int] = {}
        self.keys = 0

    def here(self, path: Path) -> None:
        self.lines.setdefault(path, self.text.count("\n") + 1)

    def new_key(self) -> tuple[str, str]:
        self.keys += 1
        name = f"k{self.keys}"
        return self.choose.choice(
            [(name, name), (name, f'"{name}"'), (name, f"'{name}'"), (f'{name}="', f'"{name}=\\""')]
        )

    def gap(self) -> None:
        self.text += self.choose.choice(["", "\n", "# [x] = {\n", "  \t\n", "\r\n", "\n\n# '''\n"])

    def pair(self, table: Path, depth: int) -> None:
        path, written = table, []
        for _ in range(self.choose.choice([1, 1, 2, 3])):
            key, as_written = self.new_key()
            path = (*path, key)
            written.append(as_written)
            self.here(path)
        self.text += self.choose.choice([".", " . "]).join(written)
        self.text += self.choose.choice(["=", " = "])
        self.value(path, depth)

    def value(self, path: Path, depth: int) -> None:
        kind = self.choose.choice(["plain", "plain", "array", "table"] if depth else ["plain"])
        if kind == "plain":
            self.text += self.choose.choice(
                [
                    "1",
                    "true",
                    "-1.5e3",
                    "1979-05-27 07:32:00Z",
                    '"a # ] } = \\" \\\\"',
                    "'# \\'",
                    '""',
                    "''",
                    '"""\n[a]\nb = 1\n\\""" ""x""\\\n  """',
                    "'''\n[c]\n\\'''",
                    '"""x"""""',
                    "''''''",
                    "'''a'''''",
                ]
            )
        elif kind == "array":
            self.text += "["
            for i in range(self.choose.randrange(4)):
                if i:
                    self.text += ","
                self.gap()
                self.here((*path, i))
                self.value((*path, i), depth - 1)
                self.gap()
            self.text += "]"
        else:
            self.text += "{"
            for i in range(self.choose.randrange(3)):
                self.text += ", " if i else " "
                self.pair(path, depth - 1)
            self.text += " }"

    def body(self, table: Path) -> None:
        for _ in range(self.choose.randrange(3)):
            self.gap()
            self.text += self.choose.choice(["", "  "])
            self.pair(table, 2)
            self.text += self.choose.choice(["\n", "\r\n", " # {[\n"])

    def header(self, inside: Path, names: list[str], array: list[int]) -> None:
        """A table (or, with a number, the next table of an array) and perhaps some below it."""
        key, written = self.new_key()
        names = [*names, written]
        for i in range(self.choose.choice([1, 2, 3]) if array else 1):
            self.gap()
            self.here((*inside, key))
            path = (*inside, key, i) if array else (*inside, key)
            self.here(path)
            self.text += ("[[%s]]" if array else "[ %s ]") % ".".join(names)
            self.text += self.choose.choice(["\n", " # ]\n"])
            self.body(path)
            if len(names) < 4 and self.choose.random() < 0.5:
                self.header(path, names, self.choose.choice([[], [0]]))

    def document(self) -> None:
        self.body(())
        for _ in range(self.choose.randrange(4)):
            self.header((), [], self.choose.choice([[], [0]]))


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_each_key_is_found_on_the_line_where_it_was_written(seed):
    writer = Writer(random.Random(seed))
    writer.document()
    assert paths_of(tomllib.loads(writer.text)) == set(writer.lines)
    assert line_numbers(writer.text) == writer.lines


FRAGMENTS = st.sampled_from(
    [
        "a",
        "b",
        "a.b",
        '"a"',
        "'c'",
        " = ",
        "=",
        "1",
        "[",
        "]",
        "[[",
        "]]",
        "{",
        "}",
        ",",
        "\n",
        "\r\n",
        "#",
        ".",
        '"""',
        "'''",
        '"',
        "'",
        "\\",
        "[a]\n",
        "[[a]]\n",
        "[a.b]\n",
        "a = 1\n",
        "b.c = 2\n",
        "x = [1, {y = 2}]\n",
        "true",
        "1.5",
        " ",
    ]
)


@settings(max_examples=1500, deadline=None)
@given(text=st.lists(FRAGMENTS, max_size=14).map("".join))
@example('a = """"""\nb = 1')
@example("a = ''''x''''\nb = 1")
@example('[[a]]\n[a.b]\n[[a]]\n[a.b]\nc = 1\n[[a.d]]\n[[a.d]]\n"a.d" = [[], [1, [2]]]')
def test_whatever_tomllib_accepts_gives_the_same_keys(text):
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return
    assert set(line_numbers(text)) == paths_of(values)
