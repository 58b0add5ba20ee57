"""What a configuration names is ours, a module's or a file's, and is found in one way."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import Field

from megarlx import plug
from megarlx.config import ConfigError, load_config
from megarlx.config.allowed import allowed
from megarlx.config.section import Named, Section

OURS = [(kind, name) for kind, one in plug.KINDS.items() for name in one.ours]
WRONG = ["f", "module:", ":f", "module:f()", "", "a b:c", "../x:y", "module:1", ":"]


@pytest.mark.parametrize(("kind", "name"), OURS)
def test_each_of_our_names_stands_for_something(kind: str, name: str) -> None:
    found = plug.resolve(kind, name)
    assert callable(found) or kind == "family"


@pytest.mark.parametrize("kind", plug.KINDS)
def test_a_module_and_a_file_name_the_same_in_every_kind(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / f"named_for_{kind.replace(' ', '_')}.py"
    file.write_text("from dataclasses import dataclass\n@dataclass\nclass Thing:\n    a: int = 7\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in (f"{file.stem}:Thing", f"{file}:Thing"):
        assert plug.problem(kind, name) is None
        assert plug.whole(kind, name) == name
        assert plug.resolve(kind, name)().a == 7
    assert plug.resolve(kind, f"{file}:Thing") is plug.resolve(kind, f"{file}:Thing")


@pytest.mark.parametrize("kind", plug.KINDS)
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_form_is_told_with_what_is_allowed(kind: str, name: str) -> None:
    wrong = plug.problem(kind, name)
    assert wrong is not None
    assert repr(name) in wrong
    assert all(f'"{one}"' in wrong for one in plug.ours(kind))
    assert plug.KINDS[kind].form in wrong
    with pytest.raises(plug.PlugError, match=f"^{kind} is "):
        plug.resolve(kind, name)


@pytest.mark.parametrize("kind", plug.KINDS)
def test_what_cannot_be_imported_is_told_with_what_is_allowed(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text("raise OSError('the disk is on fire')\n")
    for name, why in (
        ("no_such_module:f", "ModuleNotFoundError"),
        ("math:no_such_function", "AttributeError"),
        (f"{tmp_path}/absent.py:f", "FileNotFoundError"),
        (f"{file}:f", "OSError: the disk is on fire"),
    ):
        with pytest.raises(plug.PlugError) as caught:
            plug.resolve(kind, name)
        assert str(caught.value).startswith(f"{kind} {name!r} cannot be imported: {why}")
        assert plug.KINDS[kind].form in str(caught.value)


class Example(Section):
    reward: Annotated[str, Named("reward")] = Field(default="judge", description="A reward")
    several: Annotated[tuple[Annotated[str, Named("environment")], ...], Field(strict=False)] = (
        Field(default=(), description="Environments")
    )


def test_a_configuration_checks_the_form_of_its_names(tmp_path: Path) -> None:
    assert allowed(*_declared("reward")).startswith('"marked_answer", ')
    path = tmp_path / "example.toml"
    path.write_text('reward = "judgge"\nseveral = ["shop", "chess"]\n')
    with pytest.raises(ConfigError) as caught:
        load_config(path, (), Example)
    first, second = caught.value.problems
    assert first.startswith(f'{path}:1: reward is "judgge"; expected "marked_answer", ')
    assert second.startswith(f'{path}:2: several[1] is "chess"; expected "calculator", ')
    path.write_text('reward = "mine.py:judge"\nseveral = ["shop", "rooms:Rooms"]\n')
    assert load_config(path, (), Example).several == ("shop", "rooms:Rooms")


def _declared(name: str) -> tuple[object, list[object]]:
    field = Example.model_fields[name]
    return field.annotation, field.metadata


def test_the_table_of_names_imports_nothing_of_megarlx() -> None:
    code = (
        "import sys; import megarlx.plug; "
        "print(sorted(m for m in sys.modules if m.startswith(('megarlx', 'torch', 'pydantic'))))"
    )
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert made.stdout.strip() == "['megarlx', 'megarlx.plug']"


@pytest.mark.parametrize("kind", plug.KINDS)
def test_every_kind_is_asked_for_somewhere(kind: str) -> None:
    asking = re.compile(rf'(resolve|Named|OptionsOf)\(\s*"{kind}"')
    askers = [
        path
        for path in Path(plug.__file__).parent.rglob("*.py")
        if asking.search(path.read_text(encoding="utf-8"))
    ]
    assert askers, f"nothing resolves a name of the kind '{kind}'"
