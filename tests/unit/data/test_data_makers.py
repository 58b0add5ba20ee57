"""Data makers: written once, whole or not at all, and told what they are told like all else."""

from __future__ import annotations

import json
import os
import signal
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from megarlx import plug
from megarlx.config import Config, ConfigError, load_config
from megarlx.config.evaluation import SuitesConfig
from megarlx.config.run_sections import DataConfig
from megarlx.config.sweep import SweepConfig
from megarlx.config.trust import check_trust, names_in
from megarlx.data.making import DESCRIPTION, MakerError, made, make
from megarlx.run.branch import recipe_config
from megarlx.run.made import data_of
from megarlx.study.kept.chosen import PATH as KEPT_CHOSEN
from megarlx.study.kept.chosen import frozen_rates
from megarlx.sweeps.plan import jobs_of

ROOT = Path(__file__).resolve().parents[3]
CONFIGS = sorted((ROOT / "configs").rglob("*.toml"))

OWN = """
from pathlib import Path

from megarlx.config.section import Section
from megarlx.data.making import Made


class Options(Section):
    letters: int = 3


class Letters:
    Options = Options
    template = None
    evaluated = ()

    def write(self, folder, options):
        for letter in "abcdef"[: options.letters]:
            (folder / letter).write_text(letter)

    def made(self, folder, options):
        return Made("bytes")
"""

SMALL: dict[str, dict[str, Any]] = {
    "world": {
        "documents": 40,
        "held_out_documents": 3,
        "prompts": 5,
        "test_questions": 4,
    },
    "agents": {
        "environments": [
            {"function": "sokoban", "tasks": 4, "test_tasks": 2, "demonstrations": 3},
            {"function": "calculator", "tasks": 4, "test_tasks": 2, "demonstrations": 3},
        ],
        "template": {"user": "seen : {content} act :"},
    },
    "own": {"letters": 4},
}
MAKERS = pytest.mark.parametrize("maker", SMALL)


def told(maker: str, folder: Path, **changes: Any) -> tuple[str, dict[str, Any]]:
    """(name, resolved options) as a configuration has them."""
    name = maker
    if maker == "own":
        (folder / "letters.py").write_text(OWN)
        name = f"{folder / 'letters.py'}:Letters"
    data = DataConfig(maker=name, folder="x", options={**SMALL[maker], **changes})
    return name, data.options


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def killed_at(number: int, name: str, folder: Path, options: dict[str, Any]) -> bool:
    """Whether a process that writes was killed as it opened or renamed its file of that number."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        return os.WIFSIGNALED(status)
    seen = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        opened = event == "open" and str(arguments[0]).startswith(str(folder))
        if event == "os.rename" or (opened and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    try:
        sys.addaudithook(watch)
        make(name, folder, options)
    finally:
        os._exit(0)


@MAKERS
def test_a_maker_killed_while_it_writes_leaves_nothing_that_counts(
    maker: str, tmp_path: Path
) -> None:
    name, options = told(maker, tmp_path)
    make(name, tmp_path / "whole", options)
    whole = files(tmp_path / "whole")
    killed = 0
    while killed_at(killed + 1, name, folder := tmp_path / f"cut-{killed}", options):
        killed += 1
        assert not (folder / DESCRIPTION).exists()
        with pytest.raises(MakerError, match="has not written it to the end"):
            made(name, folder, options)
        make(name, folder, options)
        assert files(folder) == whole | {
            path: text for path, text in files(folder).items() if path not in whole
        }
    assert killed >= len(whole)
    assert files(tmp_path / f"cut-{killed}") == whole


@MAKERS
def test_what_is_there_is_left_as_it_is(maker: str, tmp_path: Path) -> None:
    name, options = told(maker, tmp_path)
    folder = tmp_path / "data"
    make(name, folder, options)
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    make(name, folder, options)
    assert times == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert made(name, folder, options).tokenizer


OTHERS = {
    "world": {"seed": 1, "documents": 41, "settings": {"quantities": 1}},
    "agents": {"seed": 1, "environments": [{"function": "shop"}], "template": None},
    "own": {"letters": 5},
}


@pytest.mark.parametrize(
    ("maker", "option"), [(m, o) for m, given in OTHERS.items() for o in given]
)
def test_a_folder_of_other_options_is_refused(maker: str, option: str, tmp_path: Path) -> None:
    name, options = told(maker, tmp_path)
    folder = tmp_path / "data"
    make(name, folder, options)
    before = files(folder)
    _, other = told(maker, tmp_path, **{option: OTHERS[maker][option]})
    for call in (make, made):
        with pytest.raises(MakerError, match=rf"with other options: {option} = .*, not "):
            call(name, folder, other)
    assert files(folder) == before


def test_a_folder_of_another_maker_is_refused(tmp_path: Path) -> None:
    make(*told("own", tmp_path)[:1], tmp_path / "data", told("own", tmp_path)[1])
    with pytest.raises(MakerError, match=r"holds what another maker wrote, not world"):
        make("world", tmp_path / "data", told("world", tmp_path)[1])


START = """
[model]
vocab_size = 97
hidden_size = 64
heads = 4
layers = 2
intermediate_size = 128
[training]
sequence_length = 32
steps = 3
[data]
"""
WORLD = START + 'maker = "world"\nfolder = "w-{seed}"\n[data.options]\n'


def loaded(folder: Path, text: str) -> Config:
    (folder / "run.toml").write_text(text)
    return load_config(folder / "run.toml")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            WORLD + "documnts = 5\n",
            "run.toml:15: data.options.documnts: unknown key; did you mean "
            "'data.options.documents'?",
        ),
        (
            WORLD + "documents = 0\n",
            "run.toml:15: data.options.documents is 0; expected an integer of at least 1",
        ),
        (
            WORLD + "settings = { quantities = 9 }\n",
            "run.toml:15: data.options.settings make no world: world: quantities is 9",
        ),
        (
            START + 'maker = "agents"\nfolder = "a"\n[template]\nuser = "{content}"\n'
            '[[data.options.environments]]\nfunction = "shop"\ntaks = 3\n',
            "run.toml:18: data.options.environments[0].taks: unknown key; did you mean "
            "'data.options.environments[0].tasks'?",
        ),
        (
            START + 'maker = "agents"\nfolder = "a"\n',
            "data.options.environments is missing: Each a [[data.options.environments]] table",
        ),
        (START + 'maker = "wrld"\nfolder = "w"\n', 'data.maker is "wrld"; expected "world"'),
        (
            START + 'maker = "nowhere:Maker"\nfolder = "w"\n',
            "data.options: data maker 'nowhere:Maker' cannot be imported: ModuleNotFoundError",
        ),
        (
            START + 'maker = "pathlib:Path"\nfolder = "w"\n',
            "data.options: data maker 'pathlib:Path' has no Options that is a Section",
        ),
        (START + 'maker = "world"\n', "data.folder is missing; world writes what it makes there"),
        (
            START + 'maker = "world"\nfolder = "w"\ntokenizer = "bytes"\n',
            "data.tokenizer cannot be given together with data.maker, which sets it",
        ),
        (START + 'folder = "w"\n', "data.folder is for what data.maker names"),
    ],
)
def test_options_are_checked_as_all_of_the_configuration(
    text: str, said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as raised:
        loaded(tmp_path, text)
    assert said in str(raised.value)


def test_resolved_options_stand_in_resolved_json(tmp_path: Path) -> None:
    config = loaded(tmp_path, WORLD + "seed = 4\nfacts_share = 1\n")
    resolved = tmp_path / "resolved.json"
    resolved.write_text(config.to_json())
    options = json.loads(resolved.read_text())["data"]["options"]
    assert options == {**plug.resolve("data maker", "world").Options().model_dump(), **options}
    assert (options["seed"], options["facts_share"], options["documents"]) == (4, 1.0, 40_000)
    assert load_config(resolved) == config
    assert config.data is not None
    assert config.data.place == "w-4"


def test_the_run_reads_what_was_made(tmp_path: Path) -> None:
    text = WORLD.replace("w-{seed}", str(tmp_path / "w-{seed}-{problems_share}"))
    sizes = "documents = 40\nheld_out_documents = 3\nprompts = 5\n"
    config = loaded(tmp_path, text + sizes + "stories_share = 0\nproblems_share = 0.75\n")
    assert config.data is not None
    make("world", config.data.place, config.data.options)
    read = data_of(config)
    assert read is not None
    folder = tmp_path / "w-0-0.75"
    assert read.maker is None
    assert read.tokenizer == str(folder / "tokenizer.json")
    assert {s.name: s.weight for s in read.sources} == {"problems": 0.75, "facts": 0.38}
    assert all(Path(f"{s.prefix}.bin").exists() for s in (*read.sources, *read.validation))


def test_anothers_maker_is_not_imported_to_read_its_configuration(tmp_path: Path) -> None:
    name, _ = told("own", tmp_path)
    config = loaded(tmp_path, START + f'maker = "{name}"\nfolder = "w"\n')
    resolved = tmp_path / "resolved.json"
    resolved.write_text(config.to_json())
    (tmp_path / "letters.py").write_text("raise SystemExit('this was run')\n")
    plug._of_file.cache_clear()
    read = load_config(resolved, trusted=())
    assert read == config
    with pytest.raises(ConfigError, match=rf"data.maker is '{name}'.*--trust"):
        check_trust(names_in(read, {"data"}), "a run")
    with pytest.raises(SystemExit, match="this was run"):
        load_config(resolved, trusted=(name,))


def test_an_environment_in_a_makers_options_has_to_be_trusted(tmp_path: Path) -> None:
    text = 'maker = "agents"\nfolder = "a"\n[[data.options.environments]]\nfunction = "mine:Env"\n'
    config = loaded(tmp_path, START + text + '[template]\nuser = "{content}"\n')
    with pytest.raises(ConfigError, match=r"data.options.environments\[0\].function is 'mine:Env'"):
        check_trust(names_in(config, {"data"}), "a run")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(ROOT / "configs")))
def test_all_configurations_load(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    given = tomllib.loads(path.read_text(encoding="utf-8"))
    if "model" in given:
        load_config(path)
    elif "trunk" in given:
        assert jobs_of(load_config(path, (), SweepConfig))
    elif "suites" in given:
        load_config(path, (), SuitesConfig)
    elif path == ROOT / KEPT_CHOSEN:
        assert given.keys() == {"kept", "kept_arithmetic"}
        assert all(frozen_rates(world, path) for world in given)
    else:
        before = load_config(ROOT / "configs/demo_trunk.toml")
        assert recipe_config(before, path, (), "trunk").stages
