"""A run's synthetic world or its agents' tasks, and the tokenizer it keeps."""

from __future__ import annotations

import json
from pathlib import Path

from megarlx.config import Config
from megarlx.config.environment import EnvironmentConfig
from megarlx.config.objectives import PLACE, WORLD, TemplateConfig
from megarlx.config.run_sections import AgentsConfig, DataConfig, WorldConfig
from megarlx.data.conversations import Template
from megarlx.study.world.settings import WorldSettings
from megarlx.study.world.world import World
from megarlx.study.world.files import DESCRIPTION, Sizes, write_world
from megarlx.data.token_files import write_atomically
from megarlx.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from megarlx.study.environments.demonstrations import Sizes as TaskSizes
from megarlx.study.environments.demonstrations import built_in, write_environment
from megarlx.run.directory import RunDirectory, RunError

AGENTS_WORDS, AGENTS_DESCRIPTION = "agents.words", "agents.json"


def world_shares(world: WorldConfig) -> dict[str, float]:
    return {
        "problems": world.problems_share,
        "facts": world.facts_share,
        "stories": world.stories_share,
    }


def world_data(data: DataConfig, world: WorldConfig) -> DataConfig:
    """The same configuration with the world's files in place of the world."""
    folder = Path(world.place)
    shares = world_shares(world)
    changes = {
        "world": None,
        "tokenizer": str(folder / "tokenizer.json"),
        "sources": [
            {"name": kind, "prefix": str(folder / f"documents_{kind}"), "weight": share}
            for kind, share in shares.items()
            if share > 0
        ],
        "validation": [
            {"name": kind, "prefix": str(folder / f"held_out_{kind}")} for kind in shares
        ],
    }
    return DataConfig.model_validate({**data.model_dump(), **changes})


def settings_of(world: WorldConfig) -> WorldSettings:
    return WorldSettings.from_json({"seed": world.seed, **world.settings})


def sizes_of(world: WorldConfig) -> Sizes:
    shares = world_shares(world)
    total = sum(shares.values())
    documents = {k: max(1, round(world.documents * s / total)) for k, s in shares.items() if s > 0}
    return Sizes(documents, world.held_out_documents, world.prompts, world.test_questions)


def write_agents(agents: AgentsConfig, template: TemplateConfig) -> None:
    """NAME/tasks_<split>.jsonl and NAME/demonstrations.jsonl of each environment; and of all of
    them demonstrations.jsonl and agents.words, unless the folder holds just these.

    The description is written last, so a folder that has it is complete.
    """
    folder, wanted = Path(agents.folder), agents.model_dump(mode="json", exclude={"folder"})
    of_template = (template.system, template.user, template.opening, template.assistant)
    words = dict.fromkeys(" ".join(of_template).replace(PLACE, " ").split())
    wanted["words"] = list(words)
    description = folder / AGENTS_DESCRIPTION
    if description.exists():
        if json.loads(description.read_text(encoding="utf-8")) == wanted:
            return
        # Another run may be reading it.
        raise RunError(f"{folder} holds agents' tasks of other settings; use another folder")
    demonstrations: list[str] = []
    for place in agents.environments:
        given = EnvironmentConfig(
            function=place.function, options=place.options, max_turns=place.max_turns
        )
        sizes = TaskSizes(place.tasks, place.test_tasks, place.test_tasks, place.demonstrations)
        own = folder / place.label
        write_environment(
            given,
            own,
            sizes,
            seed=agents.seed,
            mistakes=place.mistakes,
            solved_only=place.solved_only,
        )
        text = (own / "demonstrations.jsonl").read_text(encoding="utf-8")
        demonstrations += text.splitlines(keepends=True)
        words |= dict.fromkeys(built_in(given).words)
    write_atomically(folder / "demonstrations.jsonl", "".join(demonstrations))
    write_atomically(folder / AGENTS_WORDS, "".join(f"{word}\n" for word in words))
    write_atomically(description, json.dumps(wanted, indent=1) + "\n")


def write_data(config: Config) -> None:
    """What a run's data need and is not there yet."""
    if config.data is not None and (world := config.data.world) is not None:
        write_world(settings_of(world), world.place, sizes_of(world))
    if config.data is not None and config.data.agents is not None:
        assert config.template is not None  # the configuration saw to it
        write_agents(config.data.agents, config.template)


def data_of(config: Config) -> DataConfig | None:
    """What is read, with files in place of the world or the agents that they were written for."""
    data = config.data
    if data is not None and data.world is not None:
        return world_data(data, data.world)
    if data is not None and data.agents is not None:
        return data.model_copy(
            update={"tokenizer": str(Path(data.agents.folder) / AGENTS_WORDS), "agents": None}
        )
    return data


def path_of(text: str, config: Config) -> str:
    """A path of the configuration, with the world's folder put in."""
    if WORLD not in text:
        return text
    data = config.data
    if data is None or (made := data.world or data.agents) is None:
        raise RunError(
            f"the path {text!r} asks for a world's folder, but there is no [data.world] and no "
            "[data.agents]"
        )
    return text.replace(WORLD, made.place)


def load_tokenizer_of(config: Config, directory: RunDirectory) -> Tokenizer | None:
    """The one that the run keeps, or else the one that its data name."""
    if directory.tokenizer.exists():
        tokenizer = load_tokenizer(str(directory.tokenizer))
    else:
        data = data_of(config)
        if data is None or data.tokenizer is None:
            return None
        if data.tokenizer == "bytes":
            tokenizer = ByteTokenizer()
        else:
            tokenizer = load_tokenizer(data.tokenizer)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise RunError(
            f"model.vocab_size is {config.model.vocab_size}; the tokenizer has "
            f"{tokenizer.vocab_size} ids"
        )
    return tokenizer


def template_of(given: TemplateConfig | None) -> Template | None:
    return None if given is None else Template(**given.model_dump())


def world_of(config: Config) -> World | None:
    """The synthetic world that the run was trained on, with its tests."""
    if config.data is None or config.data.world is None:
        return None
    written = Path(config.data.world.place) / DESCRIPTION
    if not written.exists():
        return World(settings_of(config.data.world))
    settings = json.loads(written.read_text(encoding="utf-8"))["settings"]
    return World(WorldSettings.from_json(settings))
